"""`--help` of train.py, eval.py and vlm-doctor, made from conf/ before Hydra or PyTorch is imported."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlm.launch.configs import CONF, OF_EVAL, defaults, keys_of, options_of

WIDTH = 112
INDENT = 24
PROGRAMS = {
    "train": """Train one stage of a vision-language model (image -> encoder -> connector -> LLM -> text),
evaluate it, and save what was trained.

Commands to try:
  python train.py debug=fast llm=tiny encoder=tiny     a few steps on a few samples, in seconds
  python train.py plan=true llm=llama3_8b              sizes and memory of a run, without a download
  python train.py -m connector=linear,mlp seed=1,2     a sweep: one run for each combination""",
    "eval": """Evaluate a run of train.py on its validation split (losses, visual gain, answers) or on benchmarks.

Commands to try:
  python eval.py ckpt=<run dir>                        into <run dir>/eval
  python eval.py ckpt=<run dir> num_samples=64         on 64 of the samples
  python eval.py ckpt=<run dir> benchmark=shapes       questions by type, with intervals, into <run dir>/eval/shapes
  python eval.py ckpt=<run dir> data.task=instruct out=<folder>
  python eval.py ckpt=<run dir> benchmark=shapes       a benchmark, with intervals
  python eval.py model=openai model_name=gpt-4o benchmark=shapes""",
    "doctor": """Read a dataset as training would, and report its defects, before anything is trained on it.

Commands to try:
  vlm-doctor data=shapes llm=tiny encoder=tiny         the synthetic shapes, without a download
  vlm-doctor data=captions data.annotations=captions.jsonl data.images=images
  vlm-doctor data=shapes doctor.score=true ckpt=<run dir>""",
}
TRAINED = {
    "train/loss": "the loss of a logged step, in nats per supervised token; train/<name>_loss is one term of it",
    "train/tokens": "supervised tokens of a step",
    "train/padding_ratio": "ratio of padding in a batch",
    "train/supervised_ratio": "ratio of tokens that the loss counts",
    "train/grad_norm": "norm of the gradient before it is clipped",
    "train/grad_norm/<part>": "the same for one trained part, such as the connector",
    "lr/<group>": "learning rate of a logged step, for each group of parameters that has its own",
    "params/trainable, params/total": "numbers of parameters of the model and the objective",
    "perf/tokens_per_second": "tokens of the rows per second and process, visual tokens and prompts included",
    "perf/samples_per_second": "training samples per second and process",
    "perf/step_seconds": "seconds per optimizer step, validation excluded",
    "perf/peak_memory_gb": "the most memory that the GPU held, or the process on a CPU, in 10^9 bytes",
    "time/fit_seconds": "seconds of training and of the validations in it, without the answers at the end",
}
EVALUATED = {
    "val/loss": "the loss on the validation samples; val/<name>_loss is one term of it",
    "val/loss_shuffled": "the loss with another sample's image in place of each image",
    "val/loss_blank": "the loss with a blank image in place of each image",
    "val/visual_gain": "val/loss_shuffled - val/loss of the same rows; near 0, the model ignores the images",
    "val/num_not_compared": "rows with images that could not be swapped; they are not part of val/visual_gain",
    "val/exact_match": "ratio of generated answers that equal the reference",
    "val/exact_match_constant": "the same if the one best answer, always the same, were given to every question",
    "val/exact_match_no_image": "what the best answers without the image would get, given the questions",
    "val/exact_match_low, val/exact_match_high": "the 95 % interval of val/exact_match",
    "val/num_answers": "how many answers were scored",
    "val/accuracy/<type>": "val/exact_match of the samples of one type, such as questions about colors",
    "val/accuracy_constant/<type>, val/accuracy_no_image/<type>": "the best answers without the image, of that type",
    "val/accuracy_low/<type>, val/accuracy_high/<type>": "the 95 % interval of val/accuracy/<type>",
    "val/num_answers/<type>": "the number of answers of that type",
    "val/visual_rms": "root mean square of the visual tokens; training works best where it is near val/embed_rms",
    "val/embed_rms": "root mean square of the LLM's token embeddings",
    "text/forgetting": "nats per token that the LLM has lost on plain text, against its state before training",
}


def text(program: str) -> str:
    """The whole text for one of `PROGRAMS`, each of which has a config of its name."""
    chosen = defaults(program)
    groups = [*chosen, *_other_groups(chosen)] if program != "eval" else list(chosen)
    figures = {"train": {**TRAINED, **EVALUATED}, "eval": EVALUATED}.get(program, {})
    sections = [
        PROGRAMS[program],
        "",
        "Groups, <group>=<option>; the default is in brackets:",
        *(_row(group, " ".join(_marked(group, chosen.get(group, "")))) for group in groups),
        "",
        "Options of a group, <group>.<key>=<value>, are in its file, conf/<group>/<option>.yaml; these are at the top:",
        *_keys(program),
    ]
    if figures:
        sections += ["", "Figures that are printed and written:", *_rows(figures)]
    sections += [
        "",
        "VLM_TRACEBACK=1 in the environment shows the stack trace of an error that is otherwise one line.",
        "Hydra's own flags, such as --cfg job and --info defaults: --hydra-help",
    ]
    return "\n".join(sections)


def _other_groups(chosen: Mapping[str, str]) -> list[str]:
    out = {*chosen, *OF_EVAL, "hydra"}
    return sorted(path.name for path in Path(CONF).iterdir() if path.is_dir() and path.name not in out)


def _marked(group: str, default: str) -> Iterator[str]:
    used = default.strip("[]").replace(",", " ").split()
    yield from (f"[{option}]" if option in used else option for option in options_of(group))


def _rows(lines: Mapping[str, str]) -> Iterator[str]:
    return (_row(name, what) for name, what in lines.items())


def _row(name: str, what: str) -> str:
    """A name and an explanation beside it, wrapped; below it where the name is too long."""
    start = f"  {name:{INDENT - 3}} " if len(name) <= INDENT - 3 else f"  {name}\n{'':{INDENT}}"
    lines = textwrap.wrap(what, WIDTH - INDENT, break_on_hyphens=False) or [""]
    return (start + f"\n{'':{INDENT}}".join(lines)).rstrip()


def _keys(program: str) -> Iterator[str]:
    """The keys at the top of a program's config and those below them, with their comments."""
    for key, value, comment in keys_of(Path(CONF, f"{program}.yaml")):
        shown = ".*" if value is None else "=" if "${" in value or value == "???" else f"={value}"
        yield _row(key + shown, comment or "")
