"""A Qwen2.5-VL of two layers a tower with a processor made in memory, and a world of two colours."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)


VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
LETTERS = ["<pad>", "<|im_end|>", "<|im_start|>", *VISION, *"rb", *"acdegimnopstuwx ?\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


class ImageProcessor(Qwen2_5_VLProcessor):
    """Without the video part, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture(scope="session")
def processor():
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(LETTERS)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=LETTERS[2:7]
    )
    images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56)
    return ImageProcessor(images, tokenizer, chat_template=TEMPLATE)


@pytest.fixture
def policy(processor):
    token = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(LETTERS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"), "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture
def colours():
    gymnasium = pytest.importorskip("gymnasium")

    class Colours(gymnasium.Env):
        """A red or blue frame; answer "r" or "b". +1 if right, -1 or worse if not; ends (or is cut) after four."""

        def __init__(self, cut=False, steps=4):
            self.cut, self.steps, self.done = cut, steps, 0

        def _look(self):
            self.red = bool(self.np_random.integers(2))
            image = np.zeros((28, 28, 3), np.uint8)
            image[..., 0 if self.red else 2] = 200 + self.np_random.integers(50, size=(28, 28), dtype=np.uint8)
            return {"image": image, "text": "r or b?"}

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.done = 0
            return self._look(), {}

        def step(self, action):
            valid = action in ("r", "b")
            reward = 1.0 if action == ("r" if self.red else "b") else -1.0
            reward -= 0.0 if valid else sum(map(ord, action)) / 1000  # some nonsense is worse than other
            self.done += 1
            over = self.done >= self.steps
            info = {"action_valid": valid, "action": action, "success": reward > 0}
            return self._look(), reward, over and not self.cut, over and self.cut, info

        def get_state(self):
            return {"rng": self.np_random.bit_generator.state, "red": self.red, "done": self.done}

        def set_state(self, state):
            self.np_random.bit_generator.state = state["rng"]
            self.red, self.done = state["red"], state["done"]

    return Colours
