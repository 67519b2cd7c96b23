"""What lies beside the weights of a merged checkpoint: the base's small files, and a card that says where it is
from."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from downriver.core.measurement import current_versions
from downriver.merge.plan import rows_of_tokens
from downriver.merge.stores import Store

if TYPE_CHECKING:
    from downriver.merge.report import MergeReport

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".data", ".npz"}
_LEFT = {"README.md", ".gitattributes"}


def copy_files(base: Any, store: Store, out: Path, dtype: torch.dtype | None, tokenizer: Any = None) -> bool:
    """Put the base's configuration, tokenizer and generation files into ``out``, and the new type into the config.

    A new ``tokenizer`` replaces the base's, and the configuration gets the rows that the store then has.

    Says whether whoever loads the folder ties embeddings itself, so that tied tensors need to be written only once.
    """
    if store.folder is not None:
        for file in store.folder.rglob("*"):
            place = file.relative_to(store.folder)
            hidden = any(part.startswith(".") for part in place.parts)
            small = file.suffix not in _WEIGHTS and not file.name.endswith(".index.json")
            if file.is_file() and small and not hidden and file.name not in _LEFT:
                (out / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out / place)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    for part in ("config", "generation_config"):
        if hasattr(getattr(base, part, None), "save_pretrained"):
            getattr(base, part).save_pretrained(out)
    file = out / "config.json"
    if not file.is_file():
        return False
    config = json.loads(file.read_text(encoding="utf-8"))
    if dtype is not None:
        config |= {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
    if store.layers is not None:
        _restack(config, store.layers)
    if tokenizer is not None:
        config.get("text_config", config)["vocab_size"] = rows_of_tokens(store)
    if dtype is not None or store.layers is not None or tokenizer is not None:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _ties(config)


def _restack(config: dict[str, Any], layers: Sequence[int]) -> None:
    """Say how many layers there are now, and take along what the configuration lists layer by layer."""
    part = config.get("text_config", config)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if key in part:
            before, part[key] = part[key], len(layers)
            for name, value in part.items():
                if isinstance(value, list) and len(value) == before and name != "architectures":
                    part[name] = [value[layer] for layer in layers]


def _ties(config: Mapping[str, Any]) -> bool:
    """transformers ties embeddings unless told otherwise; of a composite model the text part decides."""
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True)))


def text(report: "MergeReport", base: Store) -> str:
    """The model card: what was merged, with which parameters, and what came of it."""
    front = {
        "library_name": "transformers",
        "base_model": [entry["model"] for entry in report.inputs],
        "tags": ["merge", "downriver", report.method],
    }
    t = report.total
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# Merged by {report.method}",
        "",
        f"Made by downriver from {len(report.inputs) - 1} models and their base.",
        "",
        "| | model | fingerprint | kept | distance from base |",
        "| --- | --- | --- | --- | --- |",
        f"| base | {base.label} | {report.inputs[0]['fingerprint']} | | |",
    ]
    for i, entry in enumerate(report.inputs[1:]):
        kept = "all" if t.kept is None else f"{t.kept[i]:.2%}"
        lines.append(f"| {i} | {entry['model']} | {entry['fingerprint']} | {kept} | {t.norms[i]:.4g} |")
    lines += [f"| result | | | | {t.merged_norm:.4g} |", ""]
    lines += [f"- {name}: `{value}`" for name, value in report.parameters.items()]
    if t.conflict is not None and t.agreement is not None:
        lines.append(f"- sign conflicts: {t.conflict:.2%} of the kept entries; {t.agreement:.2%} of kept values agree")
    lines += [f"- {name}: {value}" for name, value in current_versions().items()]
    if report.copied:
        lines += ["", f"Taken from the base, wholly or in part: {', '.join(f'`{name}`' for name in report.copied)}."]
    lines += ["", "A fingerprint is taken over names, types, shapes and the first and last 64 values of every tensor."]
    return "\n".join(lines) + "\n"
