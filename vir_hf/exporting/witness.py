"""What an exported folder answers to prompts, opened without this project: run as a program of its own.

python witness.py JOB.json: `way`, `folder`, `base`, `dtype`, `device`, `num_tokens`, `cases` (`prompt`, `answer_ids`) and
`images`, a safetensors file of `(height, width, 3)` bytes by the number of the case. Into `out` it writes, for each case, the
prompt's `input_ids` and the greedy `answer`; into `logits` (safetensors) one `(num_answer_tokens, vocabulary)` tensor each:
the logits at the positions that decide the tokens of the expected answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def main(job: dict[str, Any]) -> None:
    """Answer the cases of a job and write what was found."""
    kinds = {
        "transformers": Stock,
        "adapter": Stock,
        "llava": Original,
        "gguf": Gguf,
        "llama.cpp": LlamaCpp,
        "vllm": Vllm,
    }
    reader: Any = kinds[job["way"]](Path(job["folder"]), job)
    images, found, logits = load_file(job["images"]), [], {}
    for number, case in enumerate(job["cases"]):
        inputs = reader.encode(case["prompt"], Image.fromarray(images[str(number)].numpy()))
        with torch.no_grad():
            values = reader.logits(inputs, case["answer_ids"])
            answer = reader.generate(inputs, job["num_tokens"])
        if values is not None:
            logits[str(number)] = values.float().contiguous().cpu()
        found.append({"input_ids": reader.ids(inputs), "answer": reader.decode(answer)})
    if logits:
        save_file(logits, job["logits"])
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


class Stock:
    """transformers' own classes, and PEFT's on a base."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        base = Path(job.get("base") or folder)
        fields = (
            json.loads((base / "config.json").read_text(encoding="utf-8")) if (base / "config.json").is_file() else {}
        )
        trust = {} if fields.get("model_type", "llava") == "llava" else {"trust_remote_code": True}
        self.processor = AutoProcessor.from_pretrained(folder, **trust)
        self.tokenizer = self.processor.tokenizer
        dtype = getattr(torch, job["dtype"])
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            str(job.get("base") or folder), dtype=dtype, **trust
        )
        if job["way"] == "adapter":
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(folder)).to(dtype)
        self.model = self.model.to(job["device"]).eval()

    def encode(self, prompt: str, image: Image.Image) -> Any:
        """The inputs of one prompt."""
        inputs = self.processor(images=[image], text=prompt, add_special_tokens=False, return_tensors="pt")
        return inputs.to(self.model.device)

    def ids(self, inputs: Any) -> list[int]:
        """The prompt's token ids, images and all."""
        return [int(token) for token in inputs["input_ids"][0]]

    def logits(self, inputs: Any, answer_ids: list[int]) -> torch.Tensor:
        """Logits that decide each token of an answer."""
        answer = torch.tensor([answer_ids[:-1]], dtype=torch.long, device=self.model.device)
        input_ids = torch.cat([inputs["input_ids"], answer], dim=1)
        pixels = inputs["pixel_values"].to(next(self.model.parameters()).dtype)
        output = self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixels)
        return output.logits[0, -len(answer_ids) :]

    def generate(self, inputs: Any, num_tokens: int) -> list[int]:
        """The greedy answer."""
        inputs["pixel_values"] = inputs["pixel_values"].to(next(self.model.parameters()).dtype)
        output = self.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]

    def decode(self: Any, answer: list[int]) -> Any:
        """The text of an answer."""
        return self.tokenizer.decode(answer, skip_special_tokens=True)


class Original:
    """The original LLaVA's sums, written down anew: a language model, a tower, and a projector between them.

    Source: prepare_inputs_labels_for_multimodal in llava/model/llava_arch.py of haotian-liu/LLaVA.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        from transformers import AutoConfig, CLIPImageProcessor, CLIPVisionModel

        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.fields, self.device, dtype = fields, job["device"], getattr(torch, job["dtype"])
        tower = folder / "vision_tower"
        kinds = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
        words = {name: value for name, value in fields.items() if not name.startswith("mm_")}
        config = AutoConfig.for_model(
            kinds[fields["model_type"]], **{k: v for k, v in words.items() if k != "model_type"}
        )
        self.model: Any = (
            AutoModelForCausalLM.from_pretrained(str(folder), config=config, dtype=dtype).to(self.device).eval()
        )
        self.tower: Any = CLIPVisionModel.from_pretrained(str(tower), dtype=dtype).to(self.device).eval()
        self.image_processor = CLIPImageProcessor.from_pretrained(str(tower))
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), legacy=False)
        weights = _all_tensors(folder)
        named = {
            key.removeprefix("model.mm_projector."): value for key, value in weights.items() if "mm_projector" in key
        }
        self.projector = _sequential({f"0.{k}" if k in ("weight", "bias") else k: v for k, v in named.items()})
        self.projector = self.projector.to(self.device, dtype)

    def encode(self, prompt: str, image: Image.Image) -> dict[str, Any]:
        """The pieces of text around the image token, and the image's pixels."""
        if self.fields["image_aspect_ratio"] == "pad":
            edge = max(image.size)
            colour = tuple(int(value * 255) for value in self.image_processor.image_mean)
            square = Image.new("RGB", (edge, edge), colour)
            square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
            image = square
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"]
        pieces = [self.tokenizer(text, add_special_tokens=False).input_ids for text in prompt.split("<image>")]
        return {"pieces": pieces, "pixels": pixels.to(self.device, self.tower.dtype)}

    def ids(self, inputs: dict[str, Any]) -> list[int]:
        """Not comparable: an image is one place here, and as many tokens as it has patches elsewhere."""
        return []

    def _features(self, hidden: Any) -> torch.Tensor:
        features: torch.Tensor = hidden[self.fields["mm_vision_select_layer"]]
        return features[:, 1:] if self.fields["mm_vision_select_feature"] == "patch" else features

    def _embeddings(self, inputs: dict[str, Any], answer_ids: list[int]) -> torch.Tensor:
        hidden = self.tower(inputs["pixels"], output_hidden_states=True).hidden_states
        image = self.projector(self._features(hidden))[0]
        embed = self.model.get_input_embeddings()
        before, after = (torch.tensor(ids, dtype=torch.long, device=self.device) for ids in inputs["pieces"])
        answer = torch.tensor(answer_ids, dtype=torch.long, device=self.device)
        return torch.cat([embed(before), image, embed(after), embed(answer)])[None]

    def logits(self, inputs: dict[str, Any], answer_ids: list[int]) -> torch.Tensor:
        """Logits that decide each token of an answer."""
        embeddings = self._embeddings(inputs, answer_ids[:-1])
        return self.model(inputs_embeds=embeddings).logits[0, -len(answer_ids) :]

    def generate(self, inputs: dict[str, Any], num_tokens: int) -> list[int]:
        """The greedy answer."""
        embeddings = self._embeddings(inputs, [])
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
        output = self.model.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False
        )
        return [int(token) for token in output[0]]

    decode = Stock.decode


class Gguf(Original):
    """The GGUF files of llama.cpp, on transformers' classes: its reader for the language model, clip.cpp's sums for the rest."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        from gguf import GGUFReader, dequantize
        from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

        self.device, dtype = job["device"], getattr(torch, job["dtype"])
        self.image_token_id = job["image_token_id"]
        config = AutoConfig.from_pretrained(str(folder), gguf_file=job["language_model"])
        keys = {name: field.contents() for name, field in GGUFReader(folder / job["language_model"]).fields.items()}
        config.head_dim = keys[f"{keys['general.architecture']}.attention.key_length"]  # which is not read for Qwen3
        self.model = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=job["language_model"], config=config, dtype=dtype
        )
        self.model = self.model.to(self.device).eval()
        reader = GGUFReader(folder / job["mmproj"])
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        state = {}
        for tensor in reader.tensors:
            value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            state[tensor.name] = value.reshape([int(size) for size in reversed(tensor.shape)])
        is_clip = "v.class_embd" in state
        gelu = "gelu_pytorch_tanh" if self.keys["clip.use_gelu"] else "quick_gelu"
        values = {name: self.keys[f"clip.vision.{key}"] for name, key in _SIZES.items()}
        values["hidden_act"] = "silu" if self.keys["clip.use_silu"] else gelu
        config = CLIPVisionConfig(**values) if is_clip else SiglipVisionConfig(**values, vision_use_head=False)
        tower: Any = CLIPVisionModel(config) if is_clip else SiglipVisionModel(config)
        named = {_in_tower(name): value for name, value in state.items() if name.startswith("v.")}
        tower.load_state_dict(named, strict=False)
        self.tower, self.is_clip = tower.to(self.device, dtype).eval(), is_clip
        named = {key.removeprefix("mm."): value for key, value in state.items() if key.startswith("mm.")}
        self.projector = _sequential(named, approximate="tanh").to(self.device, dtype)

    def encode(self, prompt: Any, image: Image.Image) -> dict[str, Any]:
        """The ids around the image's, and the pixels of a square image."""
        edge = self.keys["clip.vision.image_size"]
        square = image.resize((edge, edge), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(edge, edge, 3)
        mean, std = (torch.tensor(self.keys[f"clip.vision.image_{word}"]) for word in ("mean", "std"))
        pixels = ((pixels / 255.0 - mean) / std).permute(2, 0, 1)[None]
        start, end = prompt.index(self.image_token_id), len(prompt) - prompt[::-1].index(self.image_token_id)
        return {"pieces": [prompt[:start], prompt[end:]], "pixels": pixels.to(self.device, self.tower.dtype)}

    def _features(self, hidden: Any) -> torch.Tensor:
        features = torch.cat([hidden[layer] for layer in self.keys["clip.vision.feature_layer"]], dim=-1)
        return features[:, 1:] if self.is_clip else features

    def decode(self, answer: list[int]) -> Any:
        """No text: transformers makes another tokenizer of a GGUF than llama.cpp, so only logits are compared."""
        return None


_SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "image_size": "image_size", "patch_size": "patch_size",
    "layer_norm_eps": "attention.layer_norm_epsilon",
}  # fmt: skip
_WHOLE = {
    "v.class_embd": "embeddings.class_embedding",
    "v.patch_embd": "embeddings.patch_embedding",
    "v.position_embd": "embeddings.position_embedding",
    "v.pre_ln": "pre_layrnorm",
}
_PARTS = {f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"} | {
    "attn_out": "self_attn.out_proj", "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip


def _in_tower(name: str) -> str:
    """clip.cpp's name of a tensor as transformers' vision models have it."""
    if name in _WHOLE:
        return _WHOLE[name]
    head, _, kind = name.rpartition(".")
    if head in _WHOLE:
        return f"{_WHOLE[head]}.{kind}"
    _, _, number, word = head.split(".")
    return f"encoder.layers.{number}.{_PARTS[word]}.{kind}"


class LlamaCpp:
    """llama.cpp itself, through llama-cpp-python."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.lib, self.mtmd, self.image_token_id = llama_cpp, mtmd_cpp, job["image_token_id"]
        self.llama = llama_cpp.Llama(
            str(folder / job["language_model"]), n_ctx=job["context"], n_batch=job["context"], n_ubatch=job["context"],
            logits_all=False, verbose=False, n_gpu_layers=0,
        )  # fmt: skip
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.print_timings, options.warmup = False, False, False
        self.context = mtmd_cpp.mtmd_init_from_file(str(folder / job["mmproj"]).encode(), self.llama.model, options)
        if not self.context:
            raise ValueError(f"llama.cpp does not open {job['mmproj']}")

    def encode(self, prompt: str, image: Image.Image) -> Any:
        """Chunks of text and image, as llama.cpp cuts the prompt."""
        import ctypes

        text = self.mtmd.mtmd_input_text()
        encoded = prompt.encode()
        text.text, text.add_special, text.parse_special = encoded, True, True
        text.text_len = len(encoded)
        data = image.tobytes()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        bitmap = self.mtmd.mtmd_bitmap_init(image.width, image.height, buffer)
        chunks = self.mtmd.mtmd_input_chunks_init()
        bitmaps = (self.mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = self.mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1)
        if code != 0:
            raise ValueError(f"llama.cpp does not read the prompt: code {code}")
        return chunks

    def ids(self, chunks: Any) -> list[int]:
        """The prompt's token ids; an image's as the token that stands for it."""
        import ctypes

        found: list[int] = []
        for number in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, number)
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                size = ctypes.c_size_t()
                tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))
                found += [int(tokens[place]) for place in range(size.value)]
            else:
                found += [self.image_token_id] * self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return found

    def _start(self, chunks: Any) -> None:
        import ctypes

        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        past = self.lib.llama_pos(0)
        code = self.mtmd.mtmd_helper_eval_chunks(
            self.context, self.llama._ctx.ctx, chunks, self.lib.llama_pos(0), self.lib.llama_seq_id(0), self.llama.n_batch,
            True, ctypes.byref(past),
        )  # fmt: skip
        if code != 0:
            raise ValueError(f"llama.cpp does not run the prompt: code {code}")
        self.llama.n_tokens = past.value

    def _last(self) -> torch.Tensor:
        import numpy as np

        pointer = self.lib.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(self.llama.n_vocab(),)).copy())

    def logits(self, chunks: Any, answer_ids: list[int]) -> torch.Tensor:
        """Logits that decide each token of an answer."""
        self._start(chunks)
        rows = [self._last()]
        for token in answer_ids[:-1]:
            self.llama.eval([token])
            rows.append(self._last())
        return torch.stack(rows)

    def generate(self, chunks: Any, num_tokens: int) -> list[int]:
        """The greedy answer."""
        self._start(chunks)
        answer: list[int] = []
        vocabulary = self.lib.llama_model_get_vocab(self.llama.model)
        while len(answer) < num_tokens:
            token = int(self._last().argmax())
            if self.lib.llama_vocab_is_eog(vocabulary, token):
                break
            answer.append(token)
            self.llama.eval([token])
        return answer

    def decode(self, answer: list[int]) -> str:
        """The text of an answer."""
        return str(self.llama.detokenize(answer).decode("utf-8", "replace"))


class Vllm:
    """vLLM; it is asked for answers alone."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        import vllm

        options = {"enforce_eager": True, "max_num_seqs": 1, "max_model_len": job["context"]}
        self.engine, self.question = vllm.LLM(str(folder), dtype=job["dtype"], **options), job["question"]

    def encode(self, prompt: str, image: Image.Image) -> list[dict[str, Any]]:
        """One turn; the prompt is rendered by vLLM, from the chat template beside the model."""
        content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]

    def ids(self, inputs: Any) -> list[int]:
        """Not asked for."""
        return []

    def logits(self, inputs: Any, answer_ids: list[int]) -> None:
        """Not given by its interface."""

    def generate(self, inputs: Any, num_tokens: int) -> Any:
        """The greedy answer."""
        import vllm

        return self.engine.chat(inputs, vllm.SamplingParams(temperature=0, max_tokens=num_tokens), use_tqdm=False)[0]

    def decode(self, answer: Any) -> str:
        """The text of an answer."""
        return str(answer.outputs[0].text)


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for path in sorted(folder.glob("model*.safetensors")) for name, value in load_file(path).items()
    }


def _sequential(state: dict[str, torch.Tensor], approximate: str = "none") -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for number in sorted({int(name.split(".")[0]) for name in state}):
        if layers:
            layers.append(torch.nn.GELU(approximate))
        weight = state[f"{number}.weight"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"{number}.bias"]})
        layers.append(layer)
    return torch.nn.Sequential(*layers).eval()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
