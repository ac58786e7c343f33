"""A merged model folder as GGUF files for llama.cpp and Ollama, each compared with the folder.

Conversion and quantising are llama.cpp's own (`llama_cpp.py`). Knows nothing of adapters: it reads a plain model folder
with its tokenizer, chat template and generation config.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qswitch.aside import file_aside, scratch
from qswitch.data.records import Record
from qswitch.data.template import PromptEncoder
from qswitch.data.turns import Message
from qswitch.errors import ModelError
from qswitch.export.llama_cpp import Engine, GgufType, check_tools, convert, has_engine, quantise
from qswitch.export.modelfile import find_layout, modelfile
from qswitch.models.gguf_cache import gguf_progress
from qswitch.models.load import attention_kind, read_plain, read_tokenizer
from qswitch.models.messages import first_line, quiet
from qswitch.models.references import ResolvedModel
from qswitch.models.shrink import CALIBRATION_PROMPTS
from qswitch.plan.gguf_header import read_header
from qswitch.run_dir import RunDir

logger = logging.getLogger(__name__)

GGUF_FOLDER = "gguf"
"""Inside the model folder."""
SCORES = "tokenizer.ggml.scores"
MAX_KL_NATS: dict[GgufType, float] = {"f16": 1e-3, "q8_0": 0.05, "q4_k_m": 0.5}
"""More than this is a fault of the conversion, not of the format: ten times what the formats cost the demo's student,
and f16 keeps bf16 weights but for the smallest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufParity:
    """One GGUF file, and how far it is from the model folder."""

    path: Path
    type: GgufType
    num_bytes: int
    num_prompts: int
    read_by: str | None = None
    """What computed the file's logits: llama.cpp, or transformers from the dequantised tensors."""
    kl_nats: float | None = None
    """KL(folder || file), mean over the tokens of the prompts, or None where nothing here reads the file."""
    top1_agreement: float | None = None
    """Share of those tokens whose most likely next token is the same."""
    same_prompt_ids: bool | None = None
    """Whether llama.cpp reads the templated prompts as the same token ids; None without llama.cpp."""
    missing_end_tokens: tuple[str, ...] = ()
    """End tokens of the folder at which llama.cpp would not stop by itself; the Modelfile names them all."""
    note: str = ""
    """Why something above is None."""


def export_run_gguf(run_path: Path, model_dir: Path, types: Sequence[str]) -> list[GgufParity]:
    """`export_gguf` of a run's merged model, with the run's name and system message.

    Raises:
        ModelError: as `export_gguf`; or a type is unknown.
    """
    config = RunDir.open(run_path).config
    return export_gguf(
        model_dir,
        check_tools(types),
        system_prompt=config.data.system_prompt,
        name=run_path.resolve().name,
        trust_remote_code=config.student.trust_remote_code,
    )


def export_gguf(
    model_dir: Path,
    types: Sequence[GgufType],
    *,
    system_prompt: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> list[GgufParity]:
    """Write MODEL_DIR/gguf/NAME-TYPE.gguf for each type, a Modelfile for the first, and parity.json.

    Files of the same name are replaced. `system_prompt` becomes the Modelfile's system message.

    Raises:
        ModelError: a tool is missing, llama.cpp does not know the family or the tokenizer, or the disk is full.
    """
    name = name or model_dir.resolve().name
    folder = model_dir / GGUF_FOLDER
    tokenizer = read_tokenizer(ResolvedModel(str(model_dir), None, name), trust_remote_code)
    encoder = PromptEncoder(tokenizer)
    prompts = [_rendered(encoder, [("user", text)]) for text in CALIBRATION_PROMPTS]
    try:
        folder.mkdir(exist_ok=True)
        start = _start_that_engines_add(tokenizer, prompts[0])
        paths = _write(model_dir, folder, types, name, add_bos=bool(start))
        with file_aside(folder / "Modelfile") as partial:
            first, *others = [path.name for path in paths.values()]
            text = modelfile(
                first,
                find_layout(lambda turns: _rendered(encoder, turns), start=start),
                system=system_prompt,
                stop=[tokenizer.convert_ids_to_tokens(i) for i in _end_ids(model_dir, tokenizer)],
                others=others,
            )
            partial.write_text(text, encoding="utf-8")
        read = functools.partial(read_plain, model_dir, trust_remote_code)
        reports = _compare(read, paths, tokenizer, prompts, end_ids=_end_ids(model_dir, tokenizer), start=start)
        with file_aside(folder / "parity.json") as partial:
            listed = [{**asdict(report), "path": report.path.name} for report in reports]
            partial.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}. Check the path and the free space.") from error
    for report in reports:
        limit = MAX_KL_NATS[report.type]
        if report.kl_nats is not None and not report.kl_nats <= limit:
            logger.warning(
                "%s differs from %s by KL %.3g nats (limit %g), more than %s explains. Compare their answers before "
                "use, and please report the model family.",
                report.path.name,
                model_dir,
                report.kl_nats,
                limit,
                report.type,
            )
        if report.same_prompt_ids is False:
            logger.warning("%s: llama.cpp splits prompts into other tokens than the folder.", report.path.name)
    return reports


def _write(
    model_dir: Path, folder: Path, types: Sequence[GgufType], name: str, *, add_bos: bool
) -> dict[GgufType, Path]:
    paths = {kind: folder / f"{name}-{kind}.gguf" for kind in types}
    with scratch(folder) as work:
        staged = work / "model"
        _stage(model_dir, staged, add_bos)
        try:
            for kind in ("f16", "q8_0"):
                if kind in paths:
                    with file_aside(paths[kind]) as partial:
                        _convert(staged, partial, kind, name)
            if "q4_k_m" in paths:
                if "f16" not in paths:
                    _convert(staged, work / "f16.gguf", "f16", name)
                with file_aside(paths["q4_k_m"]) as partial:
                    quantise(paths.get("f16", work / "f16.gguf"), partial, "q4_k_m")
        except ModelError as error:
            raise ModelError(
                f"{model_dir} cannot be written as GGUF. {error} The folder itself is complete: transformers and vLLM "
                "read it. A newer llama.cpp may know the model (set QSWITCH_LLAMA_CPP to it)."
            ) from error
    return paths


def _convert(staged: Path, target: Path, kind: Literal["f16", "q8_0"], name: str) -> None:
    """As `convert`, and an error where the file would split text into other tokens than the folder.

    llama.cpp joins the pieces of a SentencePiece vocabulary by their scores, which tokenizer.model holds and
    tokenizer.json does not. Without that file the converter gives every piece the same one.
    """
    convert(staged, target, kind, name=name)
    values, _ = read_header(target, items_of=SCORES)
    if values.get("tokenizer.ggml.model") == "llama" and len(set(values.get(SCORES, ()))) == 1:
        raise ModelError(
            "Its vocabulary is one of SentencePiece, and the folder lacks tokenizer.model, without which llama.cpp "
            "splits text into other tokens. Copy that file from the model that the student was made from."
        )


def _stage(model_dir: Path, staged: Path, add_bos: bool) -> None:
    """The model folder by links, its tokenizer told whether engines are to add begin-of-text by themselves."""
    staged.mkdir()
    for path in model_dir.iterdir():
        if path.is_file():
            (staged / path.name).symlink_to(path.resolve())
    config = staged / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.unlink()
    config.write_text(json.dumps({**values, "add_bos_token": add_bos}), encoding="utf-8")


def _compare(
    read: Callable[[], Any],
    paths: dict[GgufType, Path],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    end_ids: Sequence[int],
    start: str,
) -> list[GgufParity]:
    """What the files are against the model that `read` reads, by llama.cpp where it is installed and knows the family,
    else by transformers."""
    model = read()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    expected = _logits(model, ids)
    attention = attention_kind(model.config)
    del model
    reports = []
    for kind, path in paths.items():
        report = GgufParity(path=path, type=kind, num_bytes=path.stat().st_size, num_prompts=len(ids))
        note = "pip install llama-cpp-python to compare token ids and end tokens in llama.cpp itself"
        if has_engine():
            try:
                report = _read_by_llama_cpp(
                    report, expected, ids, [text.removeprefix(start) for text in prompts], tokenizer, end_ids
                )
                note = ""
            except ModelError as error:
                note = f"{error} A newer llama-cpp-python may know the family"
                logger.warning("%s", note)
        reports.append(_read_by_transformers(report, expected, ids, attention, note) if note else report)
    return reports


def _read_by_llama_cpp(
    unread: GgufParity,
    expected: Sequence[Tensor],
    ids: Sequence[list[int]],
    texts: Sequence[str],
    tokenizer: Any,
    end_ids: Sequence[int],
) -> GgufParity:
    """`texts` are the prompts of `ids` without the begin-of-text that the engine adds.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """
    engine = Engine(unread.path, context=max(map(len, ids)) + 1)
    try:
        kl_nats, agreement = _difference(expected, [engine.logits(row) for row in ids])
        missing = [i for i in end_ids if not engine.ends_generation(i)]
        return replace(
            unread,
            read_by=f"llama.cpp (llama-cpp-python {engine.version})",
            kl_nats=kl_nats,
            top1_agreement=agreement,
            same_prompt_ids=all(engine.tokenize(t) == row for t, row in zip(texts, ids, strict=True)),
            missing_end_tokens=tuple(tokenizer.convert_ids_to_tokens(missing)),
        )
    finally:
        engine.close()


def _read_by_transformers(
    unread: GgufParity, expected: Sequence[Tensor], ids: Sequence[list[int]], attention: str | None, note: str
) -> GgufParity:
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), gguf_progress():
            model = AutoModelForCausalLM.from_pretrained(
                unread.path.parent, gguf_file=unread.path.name, dtype=torch.float32, attn_implementation=attention
            )
    except (ImportError, ValueError, LookupError, RuntimeError, NotImplementedError, OSError) as error:
        return replace(unread, note=f"transformers cannot read it back ({first_line(error)}); {note}")
    kl_nats, agreement = _difference(expected, _logits(model.eval(), ids))
    return replace(unread, read_by="transformers", kl_nats=kl_nats, top1_agreement=agreement, note=note)


@torch.no_grad()
def _logits(model: Any, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in ids]


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """KL in nats and top-1 agreement, means over all tokens."""
    total, agreed, tokens = 0.0, 0, 0
    for p, q in zip(expected, found, strict=True):
        width = min(p.shape[1], q.shape[1])  # a converter may pad the vocabulary
        p_log, q_log = p[:, :width].double().log_softmax(-1), q[:, :width].double().log_softmax(-1)
        total += (p_log.exp() * (p_log - q_log)).sum().item()
        agreed += int((p_log.argmax(-1) == q_log.argmax(-1)).sum())
        tokens += p.shape[0]
    return max(total / tokens, 0.0), agreed / tokens


def _rendered(encoder: PromptEncoder, turns: Sequence[tuple[str, str]]) -> str:
    messages = tuple(Message(role, content) for role, content in turns)
    return encoder.render(Record(id=0, messages=messages, response=None, source="the exported chat template"))


def _start_that_engines_add(tokenizer: Any, prompt: str) -> str:
    """Begin-of-text where tokenizer and template both put it, else nothing.

    llama.cpp and Ollama add the token where the file says so, and take one out of the template's text in return. A
    template without it must not get one, and a tokenizer without it may use the same token for something else
    (<|im_start|> in SmolLM2).
    """
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds and prompt.startswith(tokenizer.bos_token) else ""


def _end_ids(model_dir: Path, tokenizer: Any) -> list[int]:
    """Tokens that end a response, as generation_config.json and the tokenizer have them."""
    path = model_dir / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id]
    return list(dict.fromkeys(i for i in ids if i is not None))
