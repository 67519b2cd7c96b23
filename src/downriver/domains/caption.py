"""An image-to-text model grafted together from a vision-language encoder and any language model as its writer.

Reach for it to caption and translate in languages of which the encoder knows nothing: the encoder reads the image and
a prompt that names task, language and source text; the writer may be the encoder's own decoder with another
vocabulary, or a causal language model into which cross-attention is inserted.

Spravil et al. 2025, «Florenz: Scaling Laws for Systematic Generalization in Vision-Language Models», arXiv:2503.09443:
Florence-2 with Gemma's vocabulary, and Florence-2's encoder with Gemma-2 as the writer. No code was published. The
gated attention before every layer of the writer is Flamingo's (Alayrac et al. 2022); with it the sizes come out near
the 3.5B and 11.2B stated. The wording of prompts and of openings is ours.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from downriver.core.errors import InputError, unknown
from downriver.core.io import atomic_folder
from downriver.models.images import CONFIG, ImageProcessor
from downriver.models.vocabulary import swap_vocabulary

CrossAttention = Literal["native", "inserted"]
LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "ru": "Russian", "zh": "Chinese"}
PROMPTS = {"caption": "Describe the image in {language}.", "translate": "Translate into {language}: {source}"}
PREFIXES = {
    "en": "The image shows",
    "de": "Das Bild zeigt",
    "fr": "La photo montre",
    "es": "La imagen muestra",
    "ru": "На фото изображено",
    "zh": "图片显示",
}
SETTINGS = "downriver_vlm.json"
WEIGHTS = "model.safetensors"
IGNORED = -100


@dataclass(frozen=True)
class Written:
    """What was decoded: token ids a row (a forced opening included, the end not) and their log-probability (n,)."""

    ids: list[list[int]]
    log_probability: Tensor


class GraftedVLM(nn.Module):
    """Image and prompt in, text out: ``encoder`` reads both, ``decoder`` writes.

    Args:
        encoder: a transformers ``Florence2Model`` or ``Florence2ForConditionalGeneration``; its vision tower, projector
            and text encoder are taken over (not copied), its decoder is not.
        decoder: a transformers causal LM. ``"native"``: one with cross-attention of its own (``BartForCausalLM``; see
            ``own_decoder``). ``"inserted"``: any other; a gated cross-attention goes before each of its layers, and its
            gate starts at 0, so that before training the text-only logits are the decoder's.
        tokenizer: of the decoder. ``prompt_tokenizer``: of the encoder, by default the same.
        image_processor: turns pictures into pixels; without it ``images`` must be float tensors.
        prompts: task to template, with ``{language}`` and ``{source}``. languages: what a language's code is called in
            a prompt; a code without a name stands for itself. prefixes: language to opening, for ``prefix="auto"``.
        smoothing: label smoothing of the loss in training (0.1 is our assumption; in evaluation there is none).

    ``forward(pixel_values, input_ids, attention_mask, labels)`` gives ``loss`` and ``logits``, as ``collate`` makes
    the batches, so that the Hugging Face ``Trainer`` or a loop of your own can train it.

    >>> import transformers as hf
    >>> from downriver.models import word_tokenizer
    >>> words = word_tokenizer(["Describe the image in French . la photo montre un chat"])
    >>> model = GraftedVLM(*small_parts(words), tokenizer=words, prefixes={"fr": "la photo"})
    >>> model.generate(torch.zeros(2, 3, 16, 16), "caption", "fr", prefix="auto", max_new_tokens=1)[0].split()[:2]
    ['la', 'photo']
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        cross_attention: CrossAttention = "native",
        *,
        tokenizer: Any,
        prompt_tokenizer: Any = None,
        image_processor: ImageProcessor | None = None,
        prompts: Mapping[str, str] = PROMPTS,
        languages: Mapping[str, str] = LANGUAGES,
        prefixes: Mapping[str, str] = PREFIXES,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if cross_attention not in ("native", "inserted"):
            raise unknown("cross_attention", cross_attention, ("native", "inserted"))
        if not 0 <= smoothing < 1:
            raise InputError(f"smoothing {smoothing}: a share from 0 to below 1 is expected")
        whole: Any = getattr(encoder, "model", encoder)
        if not all(hasattr(whole, part) for part in ("vision_tower", "multi_modal_projector", "language_model")):
            raise InputError(f"encoder is a {type(encoder).__name__}: a Florence2Model of transformers is expected")
        self.vision: Any = whole.vision_tower
        self.projector: Any = whole.multi_modal_projector
        self.reader: Any = whole.language_model.encoder
        self.decoder = decoder
        self.cross_attention = cross_attention
        self.tokenizer, self.prompt_tokenizer = tokenizer, prompt_tokenizer or tokenizer
        self.image_processor = image_processor
        self.prompts, self.languages, self.prefixes = dict(prompts), dict(languages), dict(prefixes)
        self.smoothing = smoothing
        self._encoder_config: Any = whole.config
        config: Any = decoder.config
        read, written = whole.config.text_config.d_model, config.hidden_size
        self.bridge: nn.Module = nn.Identity()
        self.crossings = nn.ModuleList()
        if cross_attention == "native":
            if not _attends(decoder):
                raise InputError(f"a {type(decoder).__name__} has no cross-attention of its own: say 'inserted'")
            if read != written:
                self.bridge = nn.Linear(read, written)
        else:
            heads = config.num_attention_heads
            like: dict[str, Any] = {"dtype": next(decoder.parameters()).dtype}
            self.crossings.extend(GatedCrossAttention(written, read, heads).to(**like) for _ in _layers(decoder))

    @classmethod
    def from_pretrained(
        cls,
        encoder: str | Path,
        decoder: str | Path | None = None,
        vocabulary: str | Path | None = None,
        **settings: Any,
    ) -> "GraftedVLM":
        """Graft checkpoints: folders, or names on the hub (of Florence-2 in transformers' layout, such as
        ``florence-community/Florence-2-base``).

        With a ``decoder`` (``google/gemma-2-2b``) cross-attention is inserted into it. Without one the encoder's own
        decoder writes, with the vocabulary of the tokenizer ``vocabulary`` where one is named.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, Florence2ForConditionalGeneration

        whole = Florence2ForConditionalGeneration.from_pretrained(encoder)
        settings["prompt_tokenizer"] = AutoTokenizer.from_pretrained(encoder)
        if (Path(encoder) / CONFIG).is_file():
            settings.setdefault("image_processor", ImageProcessor.from_pretrained(encoder))
        if decoder is not None:
            if vocabulary is not None:
                raise InputError("vocabulary is for the encoder's own decoder: a decoder brings its own")
            writer = AutoModelForCausalLM.from_pretrained(decoder)
            return cls(whole, writer, "inserted", tokenizer=AutoTokenizer.from_pretrained(decoder), **settings)
        writer, tokenizer = own_decoder(whole), settings["prompt_tokenizer"]
        if vocabulary is not None:
            tokenizer = AutoTokenizer.from_pretrained(vocabulary)
            swap_vocabulary(writer, settings["prompt_tokenizer"], tokenizer)
        return cls(whole, writer, tokenizer=tokenizer, **settings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def prompt(self, task: str, lang: str, source: str | None = None) -> str:
        """What the encoder reads besides the image; ``InputError`` for an unknown task, or without the source text
        that its template needs."""
        if task not in self.prompts:
            raise unknown("task", task, self.prompts)
        template = self.prompts[task]
        if ("{source}" in template) != (source is not None):
            needs = "needs a source text" if source is None else "takes no source text"
            raise InputError(f"task {task!r} {needs}: its prompt is {template!r}")
        return template.format(language=self.languages.get(lang, lang), source=source)

    def pixels(self, images: Any) -> Tensor:
        """Images as the vision tower takes them, (n, 3, height, width)."""
        if isinstance(images, Tensor) and images.is_floating_point():
            if images.ndim != 4:
                raise InputError(f"images of shape {tuple(images.shape)}: (n, 3, height, width) is expected")
            return images.to(self.device)
        if self.image_processor is None:
            raise InputError("pictures need an image_processor; without one a float tensor (n, 3, h, w) is expected")
        return self.image_processor(list(images)).to(self.device)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows with ``image``, ``task``, ``language``, ``source`` (None where the task has none) and ``target`` as one
        padded batch; without ``target`` there are no labels."""
        first = rows[0]["image"]
        pixels = self.pixels(
            torch.stack([r["image"] for r in rows]) if isinstance(first, Tensor) else [r["image"] for r in rows]
        )
        batch = {
            "pixel_values": pixels,
            **self._read([self.prompt(r["task"], r["language"], r.get("source")) for r in rows]),
        }
        if "target" in rows[0]:
            words = self.tokenizer([r["target"] for r in rows], add_special_tokens=False)["input_ids"]
            written = [[*ids, self.tokenizer.eos_token_id] for ids in words]
            longest = max(map(len, written))
            labels = [ids + [IGNORED] * (longest - len(ids)) for ids in written]
            batch["labels"] = torch.tensor(labels, device=self.device)
        return batch

    def encode(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """States of the image and the prompt, (n, image tokens + prompt, width), and which of them count."""
        seen = self.projector(self.vision(pixel_values).last_hidden_state)
        mask = torch.cat([attention_mask.new_ones(seen.shape[:2]), attention_mask], dim=1)
        both = torch.cat([seen, self.reader.embed_tokens(input_ids).to(seen.dtype)], dim=1)
        states = self.reader(inputs_embeds=both, attention_mask=mask).last_hidden_state
        return self.bridge(states), mask

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The mean loss of a target token, and the logits (n, target tokens, vocabulary) with the right words given."""
        given = labels.new_full(labels.shape, self._start)
        given[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self._pad)
        logits = self._write(given, *self.encode(pixel_values, input_ids, attention_mask)).logits
        smoothing = self.smoothing if self.training else 0.0
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=smoothing)
        return {"loss": loss, "logits": logits}

    @torch.no_grad()
    def decode(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        prefix: Sequence[int] = (),
        max_new_tokens: int = 64,
    ) -> Written:
        """Write the likeliest token at each step, after a forced opening, to the end or for ``max_new_tokens`` more."""
        end, n = self.tokenizer.eos_token_id, len(pixel_values)
        states, mask = self.encode(pixel_values, input_ids, attention_mask)
        last = torch.full((n, 1), self._start, device=self.device)
        total, done, cache = torch.zeros(n, device=self.device), torch.zeros(n, dtype=torch.bool), None
        rows: list[list[int]] = [[] for _ in range(n)]
        for step in range(len(prefix) + max_new_tokens):
            out = self._write(last, states, mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            log_p = out.logits[:, -1].float().log_softmax(-1)
            last = (
                torch.full((n, 1), prefix[step], device=self.device) if step < len(prefix) else log_p.argmax(-1, True)
            )
            total += log_p.gather(1, last)[:, 0].masked_fill(done.to(self.device), 0.0)
            ended = done | (last[:, 0].cpu() == end) & (step >= len(prefix))
            for row, token, stopped in zip(rows, last[:, 0].tolist(), ended.tolist(), strict=True):
                row += [] if stopped else [token]
            done = ended
            if done.all():
                break
        return Written(rows, total)

    def generate(
        self,
        images: Any,
        task: str,
        lang: str,
        source: Sequence[str] | None = None,
        prefix: str | None = None,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """One text an image: its caption in ``lang``, or the translation of its ``source`` text.

        ``prefix`` is an opening that the text is forced to begin with, ``"auto"`` the language's own in ``prefixes``:
        a model that answers in a language it was trained to caption in is so brought to another. Raises ``InputError``
        for an unknown task, sources of another number than images, and a language without an opening.
        """
        pixels = self.pixels(images)
        if source is not None and len(source) != len(pixels):
            raise InputError(f"{len(source)} source texts for {len(pixels)} images: one each is expected")
        if prefix == "auto":
            if lang not in self.prefixes:
                raise unknown("language in the table of openings (prefixes)", lang, self.prefixes)
            prefix = self.prefixes[lang]
        prompts = [self.prompt(task, lang, None if source is None else source[i]) for i in range(len(pixels))]
        training = self.training
        self.eval()
        written = self.decode(
            pixels, **self._read(prompts), prefix=self._words(prefix or ""), max_new_tokens=max_new_tokens
        )
        self.train(training)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written.ids]

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Weights in safetensors, both configurations, both tokenizers and the tables, whole or not at all."""
        decoder: Any = self.decoder
        settings = {
            "encoder": self._encoder_config.to_dict(),
            "decoder": decoder.config.to_dict(),
            "cross_attention": self.cross_attention,
            "prompts": self.prompts,
            "languages": self.languages,
            "prefixes": self.prefixes,
            "smoothing": self.smoothing,
        }
        with atomic_folder(folder, overwrite) as part:
            save_model(self, str(part / WEIGHTS))
            (part / SETTINGS).write_text(
                json.dumps(settings, indent=1, ensure_ascii=False, default=str), encoding="utf-8"
            )
            self.tokenizer.save_pretrained(part / "tokenizer")
            self.prompt_tokenizer.save_pretrained(part / "prompt_tokenizer")
            if self.image_processor is not None:
                self.image_processor.save_pretrained(part)

    @classmethod
    def load(cls, folder: str | Path) -> "GraftedVLM":
        """What ``save`` wrote; ``InputError`` where the folder is none of these."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Florence2Model

        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            encoder, decoder = settings.pop("encoder"), settings.pop("decoder")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} holds no grafted model: {SETTINGS} is missing or broken ({error})") from None
        model = cls(
            Florence2Model(AutoConfig.for_model(**encoder)),  # type: ignore[arg-type]
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**decoder)),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            prompt_tokenizer=AutoTokenizer.from_pretrained(folder / "prompt_tokenizer"),
            image_processor=ImageProcessor.from_pretrained(folder) if (folder / CONFIG).is_file() else None,
            **settings,
        )
        try:
            load_model(model, str(folder / WEIGHTS))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{folder / WEIGHTS} does not fit its configuration: {error}") from None
        return model.eval()

    @property
    def _start(self) -> int:
        config: Any = self.decoder.config
        found = [getattr(config, "decoder_start_token_id", None), self.tokenizer.bos_token_id, self._pad]
        return next(token for token in found if token is not None)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _read(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        read = self.prompt_tokenizer(list(prompts), padding=True, padding_side="right", return_tensors="pt")
        return {name: read[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _write(self, ids: Tensor, states: Tensor, mask: Tensor, **cache: Any) -> Any:
        if self.cross_attention == "native":
            return self.decoder(input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=mask, **cache)
        with self._crossing(states, mask):
            return self.decoder(input_ids=ids, **cache)

    @contextmanager
    def _crossing(self, states: Tensor, mask: Tensor) -> Iterator[None]:
        """While the block runs, what enters a layer of the decoder has looked at the encoder's states before."""

        def before(crossing: nn.Module) -> Any:
            return lambda layer, inputs: (crossing(inputs[0], states, mask), *inputs[1:])

        pairs = zip(_layers(self.decoder), self.crossings, strict=True)
        hooks = [layer.register_forward_pre_hook(before(crossing)) for layer, crossing in pairs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class GatedCrossAttention(nn.Module):
    """``x + tanh(gate) * attention(norm(x), states)``; ``gate`` starts at 0, where it is the identity.

    >>> crossing = GatedCrossAttention(8, 4, 2)
    >>> x = torch.randn(1, 3, 8)
    >>> torch.equal(crossing(x, torch.randn(1, 5, 4), torch.ones(1, 5)), x)
    True
    """

    def __init__(self, width: int, read: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, kdim=read, vdim=read, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """``x`` (n, t, width), ``states`` (n, s, read), ``mask`` (n, s), 0 where a state does not count."""
        states = states.to(x.dtype)
        seen, _ = self.attention(self.norm(x), states, states, key_padding_mask=mask == 0, need_weights=False)
        return x + self.gate.tanh() * seen


def own_decoder(florence: nn.Module) -> Any:
    """A copy of Florence-2's own decoder as a causal LM, its output rows tied to its own embeddings as they were."""
    from transformers import BartForCausalLM

    whole: Any = getattr(florence, "model", florence)
    decoder = BartForCausalLM(copy.deepcopy(whole.config.text_config))
    decoder.model.decoder.load_state_dict(whole.language_model.decoder.state_dict())
    head = getattr(florence, "lm_head", None)
    if head is not None and not decoder.config.tie_word_embeddings:
        decoder.lm_head.load_state_dict(head.state_dict())
    return decoder.to(next(whole.parameters()).dtype)


def small_parts(
    tokenizer: Any,
    *,
    width: int = 32,
    layers: int = 1,
    heads: int = 2,
    patch: int = 8,
    context: int = 64,
    seed: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """A small Florence-2 with random weights for square images of a few patches, and its own decoder.

    ``patch`` is the side of a patch in pixels; ``width`` is that of vision tower, encoder and decoder alike.

    >>> from downriver.models import word_tokenizer
    >>> encoder, decoder = small_parts(word_tokenizer(["a red square"]), width=16)
    >>> type(encoder).__name__, decoder.config.d_model
    ('Florence2Model', 16)
    """
    from transformers import Florence2Config, Florence2Model

    from downriver.core.seeds import seeded

    spread = 0.5 * width**-0.5  # what 0.02 is to a width of 625
    vision = {
        "depths": [1],
        "patch_size": [patch],
        "patch_stride": [patch],
        "patch_padding": [0],
        "patch_prenorm": [False],
        "embed_dim": [width],
        "num_heads": [heads],
        "num_groups": [heads],
        "window_size": 2,
        "drop_path_rate": 0.0,
        "projection_dim": width,
        "initializer_range": spread,
    }
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "max_position_embeddings": context,
        "dropout": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
        "forced_eos_token_id": None,
        "init_std": spread,
    }
    with seeded("small_parts", seed):
        encoder = Florence2Model(
            Florence2Config(vision_config=vision, text_config=text, image_token_id=tokenizer.pad_token_id)
        )
    return encoder, own_decoder(encoder)


def _layers(decoder: nn.Module) -> nn.ModuleList:
    """The layers of a causal LM: the first list of as many modules as its configuration says."""
    config: Any = decoder.config
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise InputError(f"a {type(decoder).__name__} has no list of {config.num_hidden_layers} layers to cross")


def _attends(decoder: nn.Module) -> bool:
    """Whether a causal LM has cross-attention of its own, as its layers' names tell in transformers."""
    return any(name.rsplit(".", 1)[-1] in ("encoder_attn", "crossattention") for name, _ in decoder.named_modules())
