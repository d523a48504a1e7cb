"""Load once, then answer questions about pictures: whole, streamed or in batches.

    answerer = Answerer.load("outputs/my-run")
    answerer.answer(["photo.jpg"], "What is on the table?")
    for piece in answerer.stream(["photo.jpg"], "And beside it?"):
        print(piece, end="")

The prompt is always the one of training: the template saved with the processor, tokenised as the rows were.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from vir_hf.errors import DataError, RecipeError
from vir_hf.images.opening import ImageSource
from vir_hf.images.preprocessing import ImagePreprocessor
from vir_hf.images.sizes import upright_size
from vir_hf.rows.encoding import encode_prompt_with_images, stop_token_ids
from vir_hf.rows.image_lengths import image_lengths, in_words

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Question:
    """One thing to answer.

    Attributes:
        text: the question; what looks like a special token in it stays text.
        images: its images, shown before the text: whatever `vir_hf.open_image` takes.
        system: replaces the template's own system prompt; an empty one switches it off.
        history: earlier turns, `{"role": "user" | "assistant", "content": str | list}`; a list holds
            `{"type": "text", "text": str}` and `{"type": "image", "image": picture}`.
        parts: the question as a row writes it, where images stand between texts: `{"type": "text", "text": str}` and
            `{"type": "image"}`, one for each of `images`, or with the picture in it, as in `history`. By default the images,
            then the text.
    """

    text: str = ""
    images: Sequence[ImageSource] = ()
    system: str | None = None
    history: Sequence[Mapping[str, Any]] = ()
    parts: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        own = [part["image"] for part in self.parts if part.get("image") is not None]
        if own and not self.images:
            object.__setattr__(self, "images", own)
            bare = [{"type": "image"} if part["type"] == "image" else part for part in self.parts]
            object.__setattr__(self, "parts", bare)
        num_parts = sum(part["type"] == "image" for part in self.parts)
        if self.parts and num_parts != len(self.images):
            raise ValueError(
                f"the question has {num_parts} image parts and {len(self.images)} images; expected as many."
            )
        if self.parts and not self.text:
            text = "".join(part["text"] for part in self.parts if part["type"] == "text")
            object.__setattr__(self, "text", text)

    @classmethod
    def of_messages(cls, messages: Sequence[Mapping[str, Any]], images: Sequence[ImageSource]) -> Question:
        """Return the question that a conversation ends with, each part where it stands.

        Args:
            messages: as `to_messages` returns them, the last one the human's.
            images: one for each image part of them all, in order.
        """
        remaining = iter(images)
        *earlier, last = (
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(remaining)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in messages
        )
        has_system = bool(earlier) and earlier[0]["role"] == "system"
        return cls(
            images=[part["image"] for part in last["content"] if part["type"] == "image"],
            system="".join(part["text"] for part in earlier[0]["content"]) if has_system else None,
            history=earlier[has_system:],
            parts=[{"type": "image"} if part["type"] == "image" else part for part in last["content"]],
        )

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation up to and including this question; pictures lie in their parts."""
        system = [] if self.system is None else [{"role": "system", "content": _as_parts(self.system)}]
        images = [{"type": "image", "image": image} for image in self.images]
        if self.parts:
            remaining = iter(images)
            content = [next(remaining) if part["type"] == "image" else dict(part) for part in self.parts]
        else:
            content = [*images, {"type": "text", "text": self.text}]
        history = [{**turn, "content": _as_parts(turn["content"])} for turn in self.history]
        return [*system, *history, {"role": "user", "content": content}]

    def all_images(self) -> list[ImageSource]:
        """Return every image of the conversation, those of earlier turns first."""
        return [part["image"] for turn in self.messages() for part in turn["content"] if part["type"] == "image"]


@dataclass
class Prompt:
    """A question as the model reads it: token ids, `(3, height, width)` pixels of each view, each picture's width and height."""

    input_ids: list[int]
    pixel_values: list[torch.Tensor] = field(default_factory=list)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)


class Answerer:
    """A model and its processor, ready to answer.

    Args:
        model: a `LlavaForCausalLM`, transformers' own class, or a PEFT model around one. It is put into eval mode, and
            its sampling defaults are cleared: what `answer` is asked for decides.
        processor: the `LlavaProcessor` saved with it.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        self._preprocess = ImagePreprocessor(processor.image_processor)
        defaults = model.generation_config
        defaults.do_sample, defaults.temperature, defaults.top_p, defaults.top_k = False, None, None, None
        defaults.eos_token_id = _stops(processor, defaults)
        defaults.pad_token_id = processor.tokenizer.pad_token_id

    @classmethod
    def load(
        cls, name: str, *, adapter: str | None = None, load_in_4bit: bool = False, device: str = "auto"
    ) -> Answerer:
        """Return an answerer for a run's folder, an adapter, a checkpoint or a Hub id.

        Args:
            adapter: LoRA (and projector) to put on top of `name`.
            load_in_4bit: NF4 weights of the language model, through bitsandbytes.
            device: `auto` is the GPU if there is one.

        Raises:
            RecipeError: nothing that can be loaded lies there.
        """
        from vir_hf.model.for_use import load_run

        model, processor = load_run(
            adapter or name,
            base=name if adapter else None,
            load_in_4bit=load_in_4bit,
            device=None if device == "auto" else device,
        )
        return cls(model, processor)

    @property
    def context_length(self) -> int | None:
        """How many tokens question and answer may take together; `None` if the model does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, question: Question) -> Prompt:
        """Return what the model reads.

        Raises:
            DataError: an empty question without a picture, a picture that cannot be opened, or a conversation longer
                than the model's context.
        """
        if not question.text.strip() and not question.images:
            raise DataError("the question is empty; write one, or attach a picture.")
        input_ids, images = encode_prompt_with_images({"messages": question.messages()}, self.processor)
        limit = self.context_length
        if limit is not None and len(input_ids) >= limit:
            raise DataError(
                f"the conversation takes {len(input_ids)} tokens ({in_words(image_lengths(images, self.processor))} "
                f"among them); the model reads at most {limit}. Begin a new one, or send fewer pictures."
            )
        pixels = [self._preprocess(image) for image in images]
        if self.processor.views.is_fixed:
            return Prompt(input_ids, pixels)
        return Prompt(
            input_ids, [view for views in pixels for view in views], [upright_size(image) for image in images]
        )

    def answer(
        self,
        images: Sequence[ImageSource],
        question: str,
        system: str | None = None,
        history: Sequence[Mapping[str, Any]] | None = None,
        **generation: Any,
    ) -> str:
        """Return the answer to one question.

        Args:
            images: the pictures of this question; those of earlier turns stand in `history`.
            generation: `max_new_tokens` (512), `temperature` (0: the likeliest token), `top_p`, `timeout_seconds`, and
                anything else `transformers.GenerationConfig` takes.

        Raises:
            DataError: as `encode`.
        """
        return self.answer_batch([Question(question, images, system, history or ())], **generation)[0]

    def answer_batch(self, questions: Sequence[Question], **generation: Any) -> list[str]:
        """Return the answers to several questions, computed together; greedy ones equal those computed one by one."""
        prompts = [self.encode(question) for question in questions]
        return self.answer_prompts(prompts, **generation) if prompts else []

    def answer_prompts(self, prompts: Sequence[Prompt], **generation: Any) -> list[str]:
        """Return the answers to encoded questions; a batch too large for the GPU's memory is halved."""
        return [text for text, _ in self.answer_prompts_and_ends(prompts, **generation)]

    def answer_prompts_and_ends(self, prompts: Sequence[Prompt], **generation: Any) -> list[tuple[str, bool]]:
        """Return the same, each with whether the answer came to its own end, rather than to its greatest length."""
        try:
            output = self._generate(prompts, threading.Event(), None, generation)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(prompts) // 2
            return [
                one
                for part in (prompts[:half], prompts[half:])
                for one in self.answer_prompts_and_ends(part, **generation)
            ]
        made = output[:, max(len(prompt.input_ids) for prompt in prompts) :]
        stops = self.model.generation_config.eos_token_id
        is_stop = torch.isin(made, torch.tensor(stops if isinstance(stops, list) else [stops], device=made.device))
        texts = self.processor.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [(text.strip(), ended) for text, ended in zip(texts, is_stop.any(1).tolist(), strict=True)]

    def stream(
        self,
        images: Sequence[ImageSource],
        question: str,
        system: str | None = None,
        history: Sequence[Mapping[str, Any]] | None = None,
        **generation: Any,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as they are made; closing the iterator stops the model after its current token.

        Takes and raises what `answer` does; joined and stripped, the pieces are what it returns.
        """
        return self.stream_prompt(self.encode(Question(question, images, system, history or ())), **generation)

    def stream_prompt(
        self, prompt: Prompt, *, stop: threading.Event | None = None, **generation: Any
    ) -> Generator[str, None, None]:
        """Yield the answer to an encoded question, as `stream` does; setting `stop` ends it from another thread."""
        stop = stop or threading.Event()
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._generate([prompt], stop, streamer, generation)
            except BaseException as error:  # raised again in the reader's thread
                failure.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=work, name="answer", daemon=True)
        thread.start()
        try:
            is_first = True
            for piece in streamer:
                piece = piece.lstrip() if is_first else piece
                if piece:
                    is_first = False
                    yield piece
        finally:
            stop.set()
            thread.join()
        if failure:
            raise failure[0]

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Prompt], stop: threading.Event, streamer: Any, generation: dict[str, Any]
    ) -> torch.Tensor:
        options = {"max_new_tokens": MAX_NEW_TOKENS, **generation}
        timeout_seconds = options.pop("timeout_seconds", None)
        longest = max(len(prompt.input_ids) for prompt in prompts)
        if self.context_length is not None:
            options["max_new_tokens"] = min(options["max_new_tokens"], self.context_length - longest)
        temperature = options.pop("temperature", 0) or 0
        if temperature > 0:
            options.update(do_sample=True, temperature=float(temperature))
        else:
            options.pop("top_p", None)
        device = self.model.get_input_embeddings().weight.device
        pad = self.processor.tokenizer.pad_token_id or 0
        rows = [prompt.input_ids for prompt in prompts]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows], device=device),
            "attention_mask": torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device
            ),
        }
        pixels = [pixel for prompt in prompts for pixel in prompt.pixel_values]
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels).to(device, self._pixel_dtype())
        sizes = [(height, width) for prompt in prompts for width, height in prompt.image_sizes]
        if sizes:
            inputs["image_sizes"] = torch.tensor(sizes, device=device)
        limits = StoppingCriteriaList([_StopWhen(stop, timeout_seconds)])
        output: torch.Tensor = self.model.generate(**inputs, streamer=streamer, stopping_criteria=limits, **options)
        return output

    def pixels(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """Return `(num_images, 3, height, width)` as the vision tower takes them."""
        return torch.stack([self._preprocess(image) for image in images]).to(self._pixel_dtype())

    def _pixel_dtype(self) -> torch.dtype:
        tower = self.model.get_submodule(_tower_name(self.model))
        return next(parameter.dtype for parameter in tower.parameters() if parameter.is_floating_point())

    def view(self, image: ImageSource) -> Image.Image:
        """Return the picture as the vision tower sees it, of several views that of the whole, in 8-bit RGB."""
        wanted = self.processor.image_processor
        pixels = self._preprocess(image)
        if pixels.ndim == 4:
            pixels = pixels[0 if self.processor.views.shows_whole_first else -1]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.image_mean, wanted.image_std))
        bytes_ = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


class _StopWhen(StoppingCriteria):
    """Ends every answer of the batch when asked to, or after a time."""

    def __init__(self, stop: threading.Event, timeout_seconds: float | None) -> None:
        self.stop = stop
        self.deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_over = self.stop.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline)
        return torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)


def _as_parts(content: Any) -> Any:
    """Return a turn's content as parts: a string is text, whatever words it holds."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _stops(processor: Any, defaults: GenerationConfig) -> list[int]:
    own = defaults.eos_token_id
    own_ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*stop_token_ids(processor), *own_ids]))


def _tower_name(model: Any) -> str:
    for name, _ in model.named_modules():
        if name.endswith("vision_tower"):
            return str(name)
    raise RecipeError(f"{type(model).__name__} has no vision_tower; expected a LLaVA model.")
