"""One shape for every pretrained model: a backbone, an optional head, and what turns rows into its inputs.

Reach for ``downriver.models.load`` or ``downriver.models.small`` to get one; every method takes and gives a ``Model``.
"""

import contextlib
import copy
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from downriver import __version__
from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_folder
from downriver.models.adapted import in_wrapper, save_router, task_numbers
from downriver.nn.heads import linear_head

Kind = Literal["text-encoder", "masked-lm", "causal-lm", "vision-encoder", "module"]
Pooling = Literal["mean", "cls", "last", "tokens", "none"]
Row = Mapping[str, Any]

_TEXT = {"text-classification", "text-regression", "text-similarity"}
CAN: dict[str, set[str]] = {
    "text-encoder": _TEXT,
    "masked-lm": _TEXT | {"language-modelling"},
    "causal-lm": _TEXT | {"language-modelling"},
    "vision-encoder": {"image-classification"},
    "module": _TEXT | {"image-classification", "tabular-classification", "tabular-regression"},
}
"""Which kinds of task each kind of model can do."""

SETTINGS, HEAD, MODULE = "downriver.json", "downriver_head.safetensors", "model.safetensors"


class TaskLike(Protocol):
    """What a model asks of a task; ``downriver.tasks.Task`` has it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def splits(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def target(self) -> str | None: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


class Model(nn.Module):
    """A backbone with what it needs to do a task; it starts in evaluation mode.

    Parameters
    ----------
    backbone
        A transformers ``PreTrainedModel``, a ``PeftModel`` round one, or your own ``nn.Module``, which is called with
        the one tensor of inputs (or with the tokenizer's tensors by name) and returns a tensor of n rows.
    kind
        What the backbone is: it decides which tasks are possible (see ``CAN``) and how features are taken.
    head
        Maps pooled features (n, d) to logits (n, K). ``None`` for a bare encoder and for a language model, whose own
        LM head is part of the backbone. A head with one output is a regression head.
    processor
        A tokenizer, an image processor, or ``None``.
    pooling
        How token vectors become one: mean over real tokens, the first, the last real one, or none (the backbone's
        output). With ``tokens`` they stay as they are, and a head says something of every token.
    max_length
        Longer texts are cut to so many tokens.

    Example
    -------
    >>> from downriver.models import small
    >>> encoder = small("text-encoder", "nano")
    >>> batch = encoder.processor(["a river", "the sea"], return_tensors="pt", padding=True)
    >>> encoder.features(**batch).shape
    torch.Size([2, 32])
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer is to scale accumulated steps itself

    def __init__(
        self,
        backbone: nn.Module,
        *,
        kind: Kind = "module",
        head: nn.Module | None = None,
        processor: Any = None,
        pooling: Pooling = "none",
        source: str = "",
        max_length: int = 512,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if kind not in CAN:
            raise unknown("kind of model", kind, CAN)
        if pooling not in get_args(Pooling):
            raise unknown("pooling", pooling, get_args(Pooling))
        if max_length < 1:
            raise InputError(f"max_length is {max_length}: at least one token is expected")
        self.backbone = backbone
        self.head = head
        self.kind: Kind = kind
        self.processor = processor
        self.pooling: Pooling = pooling
        self.source = source
        self.max_length = max_length
        self.labels = tuple(labels)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the parameters are (the CPU for a model without any)."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def collate(self, task: TaskLike) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """A function that turns rows of a task into a batch for this model (on the CPU; right-padded to the longest
        row).

        Texts give the tokenizer's tensors (a pair in one sequence, or for similarity the second text under
        ``second_...``), images ``pixel_values`` (n, 3, h, w) by the processor or ``ImageProcessor()``, feature
        columns ``inputs`` (n, columns) in float32. ``labels`` is there when the rows have the target: int64 classes,
        float32 values; for language modelling the token ids with -100 where no loss is taken. A masked LM hides 15 %
        of the tokens by BERT's 80/10/10 rule: afresh for every batch in training mode, fixed by the text itself in
        evaluation mode, so that an evaluation repeats exactly whatever the batch size.

        Raises ``InputError`` when a model of this kind cannot do such a task or lacks the tokenizer for it.
        """
        called = self.source or type(self.backbone).__name__
        if task.kind not in CAN[self.kind]:
            able = ", ".join(kind for kind, tasks in CAN.items() if task.kind in tasks) or "none"
            what = f"the {task.kind} task {task.name!r}"
            raise InputError(f"a {self.kind} model ({called}) cannot do {what}: another kind is expected ({able})")
        text = task.kind in _TEXT or task.kind == "language-modelling"
        if text and self.processor is None:
            raise InputError(f"task {task.name!r} needs a tokenizer, and {called} has none: give it one as processor")
        encode = self._encode_text if text else _encode_images if task.kind.startswith("image") else _encode_columns

        def batch_of(rows: Sequence[Row]) -> dict[str, Tensor]:
            batch = encode(rows, task, self.processor)
            target = task.target
            if target is not None and target in rows[0]:
                dtype = torch.long if task.kind.endswith("classification") else torch.float32
                batch["labels"] = torch.as_tensor([row[target] for row in rows], dtype=dtype)
            return batch

        return batch_of

    def features(self, **batch: Tensor) -> Tensor:
        """Pooled features, (n, d), of a batch made by ``collate`` (``labels`` and second texts are left out); with
        ``pooling="tokens"`` the features of every token, (n, tokens, d)."""
        batch = {k: v for k, v in batch.items() if k != "labels" and not k.startswith("second_")}
        if self.kind == "module":
            out = self.backbone(**batch) if "input_ids" in batch else self.backbone(next(iter(batch.values())))
        elif in_wrapper(self.backbone):
            extra = task_numbers(self.backbone, batch)
            out = self.backbone(**batch, **extra, output_hidden_states=True).hidden_states[-1]
        else:
            out = self._trunk()(**batch)
        hidden = out if isinstance(out, Tensor) else out[0]
        if hidden.ndim == 4:  # feature maps (n, d, h, w)
            return hidden.mean(dim=(2, 3))
        if hidden.ndim == 2:
            return hidden
        if hidden.ndim != 3:
            raise InputError(f"the backbone gives a tensor of shape {tuple(hidden.shape)}: (n, d) is expected")
        mask = batch.get("attention_mask")
        hidden = hidden[:, -mask.shape[1] :] if mask is not None else hidden  # without prompts put before the tokens
        return _pool(hidden, mask, self.pooling)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """``logits``, and before them ``loss`` when the batch has ``labels``.

        Logits are (n, K) for classification, (n, 1) for regression and for similarity (the cosine of the two texts'
        features), (n, tokens, vocabulary) for a language model. The loss is the mean cross-entropy (over predicted
        tokens for a language model) or the mean squared error; in training, that of a mixture of experts has the
        losses of its routers in it.
        """
        labels, extra = batch.pop("labels", None), None
        if "second_input_ids" in batch:
            second = {k.removeprefix("second_"): v for k, v in batch.items() if k.startswith("second_")}
            logits = F.cosine_similarity(self.features(**batch), self.features(**second))[:, None]
        elif self.head is not None:
            logits = self.head(self.features(**batch))
        elif self.kind == "module":
            logits = self.features(**batch)
        elif self.kind in ("causal-lm", "masked-lm"):
            settings = {"use_cache": False} if "position_ids" in batch else {}  # with a cache, packing goes unseen
            outputs = self.backbone(**batch, **settings, **task_numbers(self.backbone, batch))
            logits, extra = outputs.logits, getattr(outputs, "router_loss", None)
            if "input_ids" in batch:
                logits = logits[:, -batch["input_ids"].shape[1] :]  # without prompts put before the tokens
        else:
            raise InputError(f"the {self.kind} {self.source} has no head: give it one with with_head(task)")
        if labels is None:
            return {"logits": logits}
        loss = self._loss(logits, labels)
        return {"loss": loss if extra is None else loss + extra, "logits": logits}

    def with_head(self, task: TaskLike) -> "Model":
        """A deep copy with a fresh head for the task: Linear(d, K) for K classes, Linear(d, 1) for regression.

        Language modelling and similarity need no head of their own: the copy then has none. The head's weights come
        from torch's random state; the width d is measured by one row of the task. An MLP made without a number of
        inputs gets it, and its scaling, from the task's training columns.
        """
        collate = self.collate(task)
        model = copy.deepcopy(self, {id(self.processor): self.processor})
        model.labels, model.head = tuple(task.labels), None
        if task.kind in ("language-modelling", "text-similarity"):
            return model
        rows = next((split for split in task.splits.values() if len(split)), None)
        if rows is None:
            raise InputError(f"task {task.name!r} has no rows: at least one is expected")
        fit_inputs: Any = getattr(model.backbone, "fit_inputs", None)
        if fit_inputs is not None and task.kind.startswith("tabular"):
            train = task.splits.get("train", rows)
            fit_inputs(_table([train[name][:] for name in task.inputs], task))
        with torch.no_grad():
            batch = {k: v.to(model.device) for k, v in collate([rows[0]]).items()}
            features = model.eval().features(**batch)
        outputs = _classes(task) if task.kind.endswith("classification") else 1
        model.head = linear_head(features.shape[1], outputs).to(features)
        return model.train(self.training)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model whole or not at all: backbone at the root in transformers' layout, so that
        ``AutoModel.from_pretrained(folder)`` works, the head and our settings beside it, and the tokenizer.

        An adapter (peft) is saved as such: its base is named by ``source`` when that source still holds the very same
        weights, and otherwise saved in ``base/``. ``downriver.models.load(folder)`` gives back the same numbers bit
        by bit.
        """
        if self.head is not None and not isinstance(self.head, nn.Linear):
            raise InputError(f"a head of type {type(self.head).__name__} cannot be saved: an nn.Linear is expected")
        folder = Path(folder)
        backbone: Any = self.backbone
        adapter, ours = hasattr(backbone, "get_base_model"), not hasattr(backbone, "save_pretrained")
        with atomic_folder(folder, overwrite) as part, quiet():
            if ours:
                save_model(backbone, str(part / MODULE))
            else:
                backbone.save_pretrained(part)
                (part / "README.md").unlink(missing_ok=True)  # peft's empty card
            if adapter:
                save_router(backbone, part)
            if adapter and not self._base_is_source():
                _save_base(self, part / "base", folder.resolve() / "base")
            if self.head is not None:
                state = {k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}
                save_file(state, part / HEAD)
            if self.processor is not None:
                self.processor.save_pretrained(part)
            settings = {
                "downriver": __version__,
                "kind": self.kind,
                "pooling": self.pooling,
                "max_length": self.max_length,
                "labels": list(self.labels),
                "source": self.source,
                "layout": "module" if ours else "adapter" if adapter else "transformers",
                "dtype": _dtype(self),
            }
            (part / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder

    def _trunk(self) -> nn.Module:
        """The part of the backbone that gives hidden states: without an LM head, with LoRA layers in place."""
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            backbone = backbone.get_base_model()
        return getattr(backbone, "base_model", backbone)

    def _encode_text(self, rows: Sequence[Row], task: TaskLike, processor: Any) -> dict[str, Tensor]:
        columns = [[row[name] for row in rows] for name in task.inputs]
        for name, column in zip(task.inputs, columns, strict=True):
            for value in column:
                if not isinstance(value, str):
                    raise InputError(f"task {task.name!r}, column {name!r}: {value!r} is not a text")
        settings = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        if task.kind == "text-similarity":
            first, second = (processor(c, padding_side="right", **settings) for c in columns)
            return dict(first) | {f"second_{k}": v for k, v in second.items()}
        masked = task.kind == "language-modelling" and self.kind == "masked-lm"
        batch = dict(processor(*columns, padding_side="right", return_special_tokens_mask=masked, **settings))
        if masked:
            hide_tokens(batch, processor, afresh=self.training)
        elif task.kind == "language-modelling":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.ndim == 3:
            if self.kind == "causal-lm" and self.head is None:
                logits, labels = logits[:, :-1], labels[:, 1:]
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        if labels.is_floating_point():
            return F.mse_loss(logits.float().squeeze(1), labels)
        return F.cross_entropy(logits.float(), labels)

    def _base_is_source(self) -> bool:
        """Whether loading ``source`` gives what lies under the adapter: its weights, and what was done to its parts."""
        from downriver.models.load import load

        mine = base_state(self)
        try:
            source = load(self.source, kind=self.kind, dtype=_dtype(self)).backbone
        except InputError:
            return False
        if _changes(source) != _changes(self.backbone):
            return False
        named = source.state_dict()
        return named.keys() == mine.keys() and all(torch.equal(named[k], mine[k].cpu()) for k in named)


def _changes(backbone: Any) -> dict[str, Any]:
    """The entries of a configuration that say what was done to a model, such as the thresholds of its gates."""
    trunk = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    config: Any = getattr(trunk, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {name: value for name, value in settings.items() if name.startswith("downriver_")}


def _dtype(model: Model) -> str:
    """The backbone's floating-point type, by its name."""
    return str(next((p.dtype for p in model.backbone.parameters()), torch.float32)).removeprefix("torch.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports away while it loads or saves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def base_state(model: Model) -> dict[str, Tensor]:
    """The weights of an adapted backbone as they are without the adapter, under the base's own names."""
    tuner: Any = model.backbone
    prefix = getattr(tuner.base_model, "prefix", None)
    base = tuner.get_base_model()
    layers = tuple(f"{name}." for name, module in base.named_modules() if hasattr(module, "base_layer"))
    state = {}
    for key, value in base.state_dict().items():
        beside = key.startswith(layers) and ".base_layer." not in key  # also what is random and frozen in an adapter
        if (prefix and prefix in key) or beside or ".modules_to_save." in key:
            continue
        # adaption prompts keep the attention block of the base under «model»
        name = key.replace(".base_layer.", ".").replace(".original_module.", ".").replace("_attn.model.", "_attn.")
        state[name] = value
    return state


def _save_base(model: Model, part: Path, final: Path) -> None:
    """Save the un-adapted base, and name it in the adapter's configuration."""
    tuner: Any = model.backbone
    state = {k: v.contiguous() for k, v in base_state(model).items()}
    tuner.get_base_model().save_pretrained(part, state_dict=state)
    if model.processor is not None:
        model.processor.save_pretrained(part)
    config = part.parent / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(final)}, indent=2))


def _pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """(n, tokens, d) → (n, d)."""
    if pooling == "tokens":
        return hidden
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if pooling == "mean":
        weight = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
    raise InputError(
        f"token vectors of shape {tuple(hidden.shape)} need a pooling: mean, cls, last or tokens is expected"
    )


def hide_tokens(batch: dict[str, Tensor], tokenizer: Any, afresh: bool) -> None:
    """BERT's masking in place: 15 % of the ordinary tokens are predicted, 80 % of them hidden, 10 % replaced, 10 %
    kept.
    """
    if tokenizer.mask_token_id is None:
        raise InputError("masked language modelling needs a tokenizer with a mask token")
    ids, special = batch["input_ids"], batch.pop("special_tokens_mask").bool()
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        tokens, ordinary = ids[row, :length], ~special[row, :length]
        if not ordinary.any():
            continue
        seed = int(torch.randint(2**31, ()).item()) if afresh else zlib.crc32(tokens.numpy().tobytes())
        draw = torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
        chance = draw[0].masked_fill(~ordinary, 2.0)
        chosen = chance <= max(0.15, chance.min().item())  # at least one token of every text
        labels[row, :length][chosen] = tokens[chosen]
        replaced = chosen & (draw[1] >= 0.8) & (draw[1] < 0.9)
        ids[row, :length][chosen & (draw[1] < 0.8)] = tokenizer.mask_token_id
        ids[row, :length][replaced] = (draw[2][replaced] * len(tokenizer)).long()
    batch["labels"] = labels


def _encode_images(rows: Sequence[Row], task: TaskLike, processor: Any) -> dict[str, Tensor]:
    from downriver.models.images import ImageProcessor

    return {"pixel_values": (processor or ImageProcessor())([row[task.inputs[0]] for row in rows])}


def _encode_columns(rows: Sequence[Row], task: TaskLike, processor: Any = None) -> dict[str, Tensor]:
    return {"inputs": _table([[row[name] for row in rows] for name in task.inputs], task)}


def _table(columns: Sequence[Any], task: TaskLike) -> Tensor:
    """Feature columns side by side, float32 (rows, columns); a value that is no finite number is refused.

    A column holds a number a row, or a vector of one length a row.
    """
    parts = []
    for name, column in zip(task.inputs, columns, strict=True):
        try:
            part = np.asarray(column, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"task {task.name!r}, column {name!r} must hold numbers, or vectors of one length ({error})"
            ) from None
        if not np.isfinite(part).all():
            raise InputError(f"task {task.name!r}, column {name!r}: a value is missing or not finite")
        parts.append(part.reshape(len(part), -1))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _classes(task: TaskLike) -> int:
    """How many classes a head needs: the named ones, or one more than the largest label in any split."""
    named = len(task.labels) or 1 + max(int(max(split[task.target][:])) for split in task.splits.values() if len(split))
    if named < 2:
        raise InputError(f"task {task.name!r} has one class only: at least two are expected")
    return named
