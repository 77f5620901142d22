"""Small random models of every family, from invented tokenizers and from published processors and configurations."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from conftest import shared
from tokenizers import AddedToken
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from vlmenv.agents.vlm import find_model

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SIZES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 1024, "longest_edge": 36864},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],  # as published ones say: vLLM's default is another
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TILES = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "size": {"height": 32, "width": 32},
    "crop_to_patches": False,
    "max_patches": 4,
}
CROPS = {
    "size": {"longest_edge": 64},
    "max_image_size": {"longest_edge": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PIXTRAL_SIZES = {
    "image_processor_type": "PixtralImageProcessor",
    "size": {"longest_edge": 96},
    "patch_size": 16,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ANYRES = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_grid_pinpoints": [[32, 32], [32, 64], [64, 32], [64, 64], [96, 96]],
}
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
CROP_TOKENS = ("<end_of_utterance>", "<fake_token_around_image>", "<image>")
CROP_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)
TURN_TEMPLATE = (
    "<bos>{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content[0].text + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ first if loop.first }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TURN_TOKENS = (
    *("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
BRIEF_TURN_TEMPLATE = (
    "<bos>{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|image|>{% else %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
BRIEF_TURN_TOKENS = (
    *("<pad>", "<bos>", "<|turn>", "<turn|>", "<|video|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"),
)
INST_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{% elif message.role == 'user' %}"
    "[INST]{% endif %}{% for part in message.content %}{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% if message.role == 'system' %}[/SYSTEM_PROMPT]{% elif message.role == 'user' %}[/INST]"
    "{% else %}</s>{% endif %}{% endfor %}"
)
INST_TOKENS = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
GLM_TOKENS = (
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>"),
    *(f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end")),
)


@dataclass(frozen=True)
class Invented:
    """What makes up a small tokenizer and processor beside the built-in model's tokenizer."""

    template: str
    image_processor: dict[str, Any]
    tokens: tuple[str, ...] = ()
    """special ones"""
    unspecial: tuple[str, ...] = ()
    """ones that are decoded"""
    end: str = "<|im_end|>"
    named: tuple[tuple[str, str], ...] = ()
    """tokens by the names of their ids in the model's configuration"""
    attributes: tuple[tuple[str, str], ...] = ()
    """tokens by the names under which the published processor looks them up"""


QWEN = Invented(
    CHATML.replace("IMAGE", QWEN_IMAGE),
    QWEN_SIZES,
    named=(
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ),
)
GLM = Invented(
    GLM_TEMPLATE,
    QWEN_SIZES | {"image_processor_type": "Glm4vImageProcessor"},
    GLM_TOKENS,
    ("<|begin_of_box|>", "<|end_of_box|>"),
    end="<|user|>",
    named=(
        ("image_token_id", "<|image|>"),
        ("video_token_id", "<|video|>"),
        *(
            (f"{kind}_{side}_token_id", f"<|{word}_of_{kind}|>")
            for kind in ("image", "video")
            for side, word in (("start", "begin"), ("end", "end"))
        ),
    ),
)
TILED = Invented(
    CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    TILES,
    ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    named=(("image_token_id", "<IMG_CONTEXT>"),),
    attributes=(
        ("start_image_token", "<img>"),
        ("end_image_token", "</img>"),
        ("context_image_token", "<IMG_CONTEXT>"),
        ("video_token", "<video>"),
    ),
)
GEMMA4 = Invented(
    BRIEF_TURN_TEMPLATE,
    {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 8,
        "max_soft_tokens": 70,
        "pooling_kernel_size": 2,
        "do_normalize": False,
    },
    BRIEF_TURN_TOKENS,
    end="<turn|>",
    named=(
        ("image_token_id", "<|image|>"),
        ("boi_token_id", "<|image>"),
        ("eoi_token_id", "<image|>"),
        ("video_token_id", "<|video|>"),
        ("audio_token_id", "<|audio|>"),
        ("boa_token_id", "<|audio>"),
        ("eoa_token_index", "<audio|>"),
    ),
    attributes=(
        ("image_token", "<|image|>"),
        ("boi_token", "<|image>"),
        ("eoi_token", "<image|>"),
        ("audio_token", "<|audio|>"),
        ("boa_token", "<|audio>"),
        ("eoa_token", "<audio|>"),
    ),
)
INVENTED = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    **dict.fromkeys(("internvl", "internvl qwen3", "internvl qwen3_moe"), TILED),
    "idefics3": Invented(
        CROP_TEMPLATE,
        CROPS | {"image_processor_type": "Idefics3ImageProcessor"},
        CROP_TOKENS,
        ("<global-img>", *PLACES),
        end="<end_of_utterance>",
        named=(("image_token_id", "<image>"),),
    ),
    "smolvlm": Invented(
        CROP_TEMPLATE,
        CROPS | {"image_processor_type": "SmolVLMImageProcessor"},
        (*CROP_TOKENS, "<global-img>", *PLACES),
        end="<end_of_utterance>",
        named=(("image_token_id", "<image>"),),
    ),
    "gemma3": Invented(
        TURN_TEMPLATE,
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        TURN_TOKENS,
        ("\n", "\n\n", "\n\n\n", "\n\n\n\n"),  # as the published tokenizer has them, for vLLM
        end="<end_of_turn>",
        named=(
            ("image_token_id", "<image_soft_token>"),
            ("boi_token_id", "<start_of_image>"),
            ("eoi_token_id", "<end_of_image>"),
        ),
        attributes=(
            ("image_token", "<image_soft_token>"),
            ("boi_token", "<start_of_image>"),
            ("eoi_token", "<end_of_image>"),
        ),
    ),
    "gemma4": GEMMA4,
    "gemma4 experts": GEMMA4,
    "mistral3": Invented(INST_TEMPLATE, PIXTRAL_SIZES, INST_TOKENS, end="</s>", named=(("image_token_id", "[IMG]"),)),
    "llava_onevision": Invented(
        CHATML.replace("IMAGE", "<image>"),
        ANYRES,
        ("<image>", "<video>"),
        named=(("image_token_id", "<image>"), ("video_token_id", "<video>")),
    ),
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "glm46v": replace(GLM, image_processor=QWEN_SIZES | {"image_processor_type": "Glm46VImageProcessor"}),
}


_ANYRES_SETTINGS: dict[str, Any] = {
    "num_image_tokens": 16,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
}
_TILED = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"processor_class": "Qwen2VLProcessor"},
    "qwen2_5_vl": {"processor_class": "Qwen2_5_VLProcessor"},
    "qwen3_vl": {"processor_class": "Qwen3VLProcessor"},
    "glm4v": {"processor_class": "Glm4vProcessor"},
    "glm4v_moe": {"processor_class": "Glm4vProcessor"},
    "glm46v": {"processor_class": "Glm46VProcessor"},
    "qwen3_5": {"processor_class": "Qwen3VLProcessor"},
    "qwen3_5_moe": {"processor_class": "Qwen3VLProcessor"},
    "internvl": _TILED,
    "internvl qwen3": _TILED,
    "internvl qwen3_moe": _TILED,
    "mistral3": {"processor_class": "PixtralProcessor", "patch_size": 8, "spatial_merge_size": 2},
    "llava_onevision": {"processor_class": "LlavaOnevisionProcessor", **_ANYRES_SETTINGS},
    "gemma3": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "gemma4": {"processor_class": "Gemma4Processor"},
    "gemma4 experts": {"processor_class": "Gemma4Processor"},
}
"""Settings of the published processors, by the names of small models."""


def tell_processor(name: str, folder: Path) -> None:
    """Writes the settings of a small model's published processor."""
    (folder / "processor_config.json").write_text(json.dumps(PROCESSORS[name]))


def invent(name: str, folder: Path, head: int = 16) -> None:
    """Writes a small model with an invented tokenizer, whose attention heads have `head` dimensions.

    Args:
        name: The model's type, and perhaps a word for a variant of it.
        folder: The folder.
        head: See above.
    """
    parts, (model_type, *variant) = INVENTED[name], name.split()
    tokenizer = AutoTokenizer.from_pretrained(find_model("builtin"))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in parts.tokens], True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in parts.unspecial])
    tokenizer.eos_token = parts.end
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"extra_special_tokens": dict(parts.attributes)} if parts.attributes else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(parts.template)
    (folder / "preprocessor_config.json").write_text(json.dumps(parts.image_processor))
    config = AutoConfig.for_model(model_type)
    if model_type == "internvl" and variant:
        config.text_config = AutoConfig.for_model(variant[0])
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id, text.bos_token_id = len(tokenizer) + 3, None, None
    text.eos_token_id = tokenizer.eos_token_id
    if model_type == "gemma4":
        config = _gemma4(text, "experts" in variant, head)
        text = config.get_text_config()
        text.pad_token_id = tokenizer.convert_tokens_to_ids("<pad>")
    for key, token in parts.named:
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    _shrink_images(config)
    if model_type != "gemma4":
        cut(config, head)
    save_random(config, folder, tokenizer.eos_token_id)


def show_videos(folder: Path) -> None:
    """Writes a part for videos into a small Qwen's chat template."""
    file = folder / "chat_template.jinja"
    shown = "<|vision_start|><|video_pad|><|vision_end|>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    text = file.read_text()
    whole = text.replace("{% else %}{{ part.text }}{% endif %}", f"{{% elif part.type == 'video' %}}{shown}")
    assert whole != text
    file.write_text(whole)


def _gemma4(text: Any, has_experts: bool, head: int) -> Any:
    """Gemma 4 in the forms of its small models, and of that with experts."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1}
    small: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": text.vocab_size,
        "use_double_wide_mlp": True,
    }
    experts: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    own = experts if has_experts else small
    language = {
        **sizes,
        **own,
        "num_hidden_layers": len(own["layer_types"]),
        "vocab_size": text.vocab_size,
        "eos_token_id": text.eos_token_id,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": head,
        "global_head_dim": 2 * head,
        "sliding_window": 12,
        "final_logit_softcapping": 3.0,
        "bos_token_id": None,
    }
    vision = {
        **sizes,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 16,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 80,
        "default_output_length": 70,  # as published, for vLLM
        "standardize": True,
        "use_clipped_linears": True,
    }
    return AutoConfig.for_model("gemma4", text_config=language, vision_config=vision)


def _shrink_images(config: Any) -> None:
    """Patches and sizes that go with the invented image processors."""
    vision = config.vision_config
    if config.model_type == "internvl":
        vision.image_size, vision.patch_size = (32, 32), (8, 8)
    elif config.model_type in ("idefics3", "smolvlm"):
        vision.image_size, vision.patch_size, config.scale_factor = 32, 8, 2
    elif config.model_type == "mistral3":
        vision.image_size, vision.patch_size = 96, 8
    elif config.model_type == "gemma3":
        vision.image_size, vision.patch_size, vision.vision_use_head, config.mm_tokens_per_image = 32, 8, False, 4
    elif config.model_type == "llava_onevision":
        vision.image_size, vision.patch_size = 32, 8
        config.image_grid_pinpoints, config.vision_aspect_ratio = ANYRES["image_grid_pinpoints"], "anyres_max_9"
    elif config.model_type != "gemma4":
        vision.patch_size = 16


def from_published(name: str, folder: Path) -> None:
    """Writes a small model with a published processor and the published configuration, cut; skips where absent."""
    source = shared(f"models/{name}")
    for file in source.iterdir():
        if file.name not in ("SOURCE.md", "config.json"):
            shutil.copyfile(file, folder / file.name)
    config = AutoConfig.from_pretrained(source)
    cut(config)
    ends = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    save_random(config, folder, ends)


def cut(config: Any, head: int = 16) -> None:
    """Leaves two narrow layers of each kind."""
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 2 * head, 48, 2
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.initializer_range = 0.1
    for name, value in {"head_dim": head, "layer_types": ["full_attention"] * 2}.items():
        if hasattr(text, name):
            setattr(text, name, value)
    if config.model_type in ("qwen3_vl_moe", "qwen3_5_moe") or text.model_type == "qwen3_moe":
        text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size = 4, 2, 16
    if config.model_type == "qwen3_5_moe":
        text.hidden_size = 64  # its gate of one output is quantised in blocks of 64
    if config.model_type.startswith("qwen3_5"):
        text.layer_types, text.linear_key_head_dim, text.linear_value_head_dim = (
            ["linear_attention", "full_attention"],
            8,
            12,
        )
        text.linear_num_key_heads, text.linear_num_value_heads = 2, 4
    if config.model_type == "gemma3":
        text.layer_types, text.sliding_window = ["sliding_attention", "full_attention"], 12
        text.query_pre_attn_scalar = 16
    if config.model_type.startswith("glm4"):
        text.attention_bias = True  # as published, for vLLM
    if config.model_type == "glm4v_moe":
        text.head_dim, text.use_qk_norm = head, False
        text.n_routed_experts, text.num_experts_per_tok, text.moe_intermediate_size = 4, 2, 16
    if config.model_type == "mistral3":
        text.sliding_window = None
    if not isinstance(text.rope_parameters, dict) or not {"rope_theta", "full_attention"} & text.rope_parameters.keys():
        text.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    if config.model_type.startswith("qwen3_5"):
        text.rope_parameters |= {"mrope_section": [head // 8, head // 16, head // 16], "partial_rotary_factor": 0.5}
        text.shared_expert_intermediate_size = 16
    elif config.model_type.startswith("qwen"):
        text.rope_parameters |= {"mrope_section": [head // 4, head // 8, head // 8]}
    if config.model_type.startswith("qwen3_vl"):
        text.rope_parameters |= {"mrope_interleaved": True}  # as published, for vLLM
    if config.model_type.startswith("glm4"):
        text.rope_parameters |= {"mrope_section": [head // 8, head // 16, head // 16], "partial_rotary_factor": 0.5}
    _cut_vision(config.vision_config, text.hidden_size, head)


def _cut_vision(config: Any, out: int, head: int) -> None:
    if config.model_type.startswith("qwen2_vl"):
        config.embed_dim, config.hidden_size = 2 * head, out
    else:
        config.hidden_size, config.intermediate_size = 2 * head, 48
    for depth, heads in (("depth", "num_heads"), ("num_hidden_layers", "num_attention_heads")):
        if hasattr(config, depth):
            setattr(config, depth, 2)
            setattr(config, heads, 2)
    if hasattr(config, "head_dim"):
        config.head_dim = head
    if hasattr(config, "out_hidden_size"):
        config.out_hidden_size = out
    if hasattr(config, "fullatt_block_indexes"):
        config.fullatt_block_indexes, config.window_size = [1], 4 * config.patch_size
    if hasattr(config, "deepstack_visual_indexes"):
        config.deepstack_visual_indexes = [0]
    config.initializer_range = 0.1


def save_random(config: Any, folder: Path, ends: int | list[int]) -> None:
    """Writes random weights, those among them too that models begin with at zero or at one."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
        if config.model_type == "gemma4" and "q_norm" in name:  # which stands for the root of the head's size
            parameter.data.mul_(0.25)
    model.generation_config.eos_token_id = ends
    generation = folder / "generation_config.json"
    kept = generation.read_bytes() if generation.is_file() else None
    model.save_pretrained(folder)
    if kept is not None:
        generation.write_bytes(kept)


def published_processor(kind: type[ProcessorMixin], *parts: Any, **arguments: Any) -> ProcessorMixin:
    """A processor as published, but without the video processor, which needs torchvision."""
    unchecked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
    return unchecked(*parts, **arguments)
