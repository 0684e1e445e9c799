"""A chat template from a stranger: the dialect of Transformers, in a sandbox, with a limit on its work."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.helpers.text import encoder, say, templated
from vlm.schema import BadSample, Sample
from vlm.text import jinja
from vlm.text.templates import TEMPLATES

MESSAGES = [
    {"role": role, "content": text} for role, text in [("user", "a<b>&é"), ("assistant", "b"), ("user", " c\n")]
]

DIALECT = {
    "the variables of a loop": (
        "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.revindex }}"
        "{{ loop.cycle('x', 'y') }}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{% endfor %}"
    ),
    "a loop with a condition and no item": "{% for m in messages if m.role == 'x' %}{{ m }}{% else %}none{% endfor %}",
    "break and continue": (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}"
    ),
    "nested loops and unpacking": (
        "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value | trim }};{% endfor %}{% endfor %}"
    ),
    "a recursive loop": "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }},{% endfor %}",
    "joined texts": "{{ messages[0].role ~ 1 ~ none }}{{ 'a' + 'b' * 3 }}{{ [1] + [2] }}{{ 2 ** 5 }}",
    "blocks and blanks": "  {% if tools %}\n x\n  {% endif %}\n{%- if not documents %}\n  y\n{% endif %}\n z",
    "filters": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | join('-', 'role') }}",
    "a macro and a namespace": (
        "{% macro f(m) %}[{{ m.role }}]{% endmacro %}{% set ns = namespace(n=0, s='') %}"
        "{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index %}{% set ns.s = ns.s ~ f(m) %}"
        "{% endfor %}{{ ns.n }}{{ ns.s }}"
    ),
    "the marks of what an assistant says": "{% generation %}{{ messages[1].content }}{% endgeneration %}",
    "what is undefined": "{{ absent }}{{ messages[0].absent }}{{ absent is defined }}{{ messages[9] }}",
    "special tokens": "{{ bos_token }}{{ dict(a=1) }}{{ 'x'.title() }}",
    **{f"our {name}": text for name, text in TEMPLATES.items()},
}


@pytest.mark.parametrize("template", DIALECT.values(), ids=list(DIALECT))
@pytest.mark.parametrize("prompt", [False, True])
def test_the_dialect_is_that_of_transformers(template, prompt):
    words = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=prompt, **words)
    assert jinja.render(template, MESSAGES, add_generation_prompt=prompt, **words) == theirs[0]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            r"its loops and calls take more than 1,000,000 steps",
        ),
        (
            "{% macro f(n) %}{{ (f(n - 1) + f(n - 1)) if n else '' }}{% endmacro %}{{ f(60) }}",
            r"its loops and calls take more than 1,000,000 steps",
        ),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "a value of",
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "a value of",
        ),
        ("{{ 'a' * n }}", "a value of 10,000,000,000 characters"),
        ("{{ n ** n }}", "a value of"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe|has no attribute|undefined"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "attribute '__class__' of a namespace"),
        ("{{ raise_exception('no chat') }}", "no chat"),
        ("{% for m in messages %}", "unexpected|Unexpected"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.absent.absent }}", "has no attribute 'absent'"),
    ],
)
def test_what_a_template_may_not_do(monkeypatch, template, error):
    monkeypatch.setattr(jinja, "MAX_STEPS", 1_000_000 if "steps" not in error else 20_000)
    monkeypatch.setattr(jinja, "MAX_SIZE", 100_000)
    error = error.replace("1,000,000", "20,000")
    with pytest.raises(ValueError, match=rf"the chat template refuses the conversation \(.*({error})"):
        jinja.render(template, MESSAGES, add_generation_prompt=False, n=10**10)


def test_the_limits_leave_room_for_every_conversation_that_may_be():
    """A million rounds are a second or so; each message of a conversation adds a hundred."""
    assert (jinja.MAX_STEPS, jinja.STEPS_PER_MESSAGE) == (1_000_000, 100)
    assert jinja.render(TEMPLATES["qwen3"], MESSAGES * 1001, add_generation_prompt=True).count("<|im_start|>") == 3004


def test_a_template_that_never_ends_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(jinja, "MAX_STEPS", 20_000)
    tokenizer = templated("{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ValueError, match=r"loops and calls take more than 20,000 steps\); set llm.chat_template="):
        encoder(tokenizer, None)


def test_a_conversation_that_a_template_refuses_is_a_bad_sample():
    tokenizer = templated(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{{ m.content }}<eos>{% endfor %}"
    )
    subject = encoder(tokenizer, None)
    messages = [say("system", "s"), say("user", "a"), say("assistant", "b")]
    for encode, turns in ((subject.encode, messages), (subject.encode_prompt, messages)):
        with pytest.raises(BadSample) as caught:
            encode(Sample("a/1", [], turns))
        assert str(caught.value) == (
            "sample 'a/1': the chat template refuses the conversation (System role not supported); "
            "repair or remove the sample, or set llm.chat_template="
        )
