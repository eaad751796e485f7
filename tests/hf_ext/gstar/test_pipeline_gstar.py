"""The pipeline: what is given stays, every option does what it says, a row is a chain of its own."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SuppressTokensLogitsProcessor,
)

from hf_ext.gstar.modeling_error_predictor import ErrorPredictor
from hf_ext.gstar.modeling_mdlm import MDLMConfig, MDLMForMaskedLM
from hf_ext.gstar.pipeline_gstar import GStarPipeline
from hf_ext.gstar.scheduling_star_shaped import MODES, StarShapedScheduler


WORDS = ["<pad>", "<eos>", "<mask>", *"abcdefghijklmnopqrstuvw"]
PAD, EOS, MASK = 0, 1, 2
SHAPE = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": EOS}
OTHERS = {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def tokenizer(**options):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{**special, **options})


def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def mdlm(**options):
    return randomised(MDLMForMaskedLM(MDLMConfig(**{**SHAPE, **IDS, "hidden_dropout": 0.0, **options})))


@pytest.fixture
def pipe():
    """`pipe(mode="star_plus", denoiser=None, num_layers=1, ...)`: in float64, with a predictor of random weights."""

    def build(mode="star_plus", denoiser=None, num_layers=1, tokens=None, **options):
        denoiser = mdlm() if denoiser is None else denoiser
        predictor = randomised(ErrorPredictor.from_denoiser(denoiser, num_layers=num_layers), seed=5)
        ours = {name: options.pop(name) for name in ("mask_token_id", "right_shift_logits") if name in options}
        made = GStarPipeline(
            denoiser,
            StarShapedScheduler(mode=mode, **options),
            tokenizer() if tokens is None else tokens,
            predictor,
            **ours,
        )
        made.set_progress_bar_config(disable=True)
        return made

    return build


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


OPTIONS = {"gen_length": 10, "num_inference_steps": 8, "eos_early_stop": False}


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_prompt_is_continued_in_every_mode(mode, pipe):
    out = pipe(mode)(prompt=["a b c", "d"], generator=seeds(1)[0], **OPTIONS)
    assert out.sequences.shape == (2, 10) and not (out.sequences == MASK).any()
    assert len(out.texts) == 2 and all(isinstance(text, str) for text in out.texts)
    # every step with the denoiser, but where nothing changed; at most one more to fill
    assert (out.denoiser_nfe >= 2).all() and (out.denoiser_nfe <= 9).all()
    guided = MODES[mode].inside == "guided"
    assert (out.predictor_nfe > 0).all() == guided


@pytest.mark.parametrize("mode", ["mdlm", "gstar_loop", "p2"])
def test_a_row_does_not_depend_on_its_batch_or_its_padding(mode, pipe):
    made = pipe(mode)
    prompts = ["a b c d e", "f", ""]
    together = made(prompt=prompts, num_return_sequences=2, generator=seeds(*range(6)), **OPTIONS).sequences
    for row, prompt in enumerate(prompts):
        alone = made(prompt=prompt, num_return_sequences=2, generator=seeds(2 * row, 2 * row + 1), **OPTIONS)
        assert torch.equal(alone.sequences, together[2 * row : 2 * row + 2])
    assert not torch.equal(together[0], together[1])


def test_inference_batch_single_identical(pipe):
    made = pipe("gstar_plus")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    both = made(input_ids=ids, generator=seeds(1, 2), output_type="seq", **OPTIONS)
    first = made(input_ids=ids[0], generator=seeds(1), output_type="seq", **OPTIONS)
    assert torch.equal(first.sequences[0], both.sequences[0]) and both.texts is None


def test_tokens_with_padding_on_either_side_are_the_same_prompt(pipe):
    made = pipe()
    expected = made(prompt="c d e", generator=seeds(3), **OPTIONS).sequences
    ids = made.tokenizer("c d e", return_tensors="pt").input_ids
    for padding in ((2, 0), (0, 3)):
        padded = torch.nn.functional.pad(ids, padding, value=9)
        mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
        got = made(input_ids=padded, attention_mask=mask, generator=seeds(3), **OPTIONS).sequences
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_filling_in_changes_masks_and_nothing_else(mode, pipe):
    made = pipe(mode)
    texts = ["a <mask> b <mask> <mask> c", "<mask> d"]
    out = made(infill=texts, num_inference_steps=6, generator=seeds(1)[0])
    first = out.sequences[0].tolist()
    assert [first[i] for i in (0, 2, 5)] == [3, 4, 5] and out.sequences[1, 1] == 6
    assert not (out.sequences == MASK).any()
    assert (out.sequences[1, 2:] == PAD).all()  # padding stays
    assert out.texts[1].split()[1] == "d" and len(out.texts[0].split()) <= 6


def test_fixed_positions_are_those_that_are_named(pipe):
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    fixed = torch.tensor([[True, False, True, False, True]])
    frames = list(pipe().stream(infill=ids, fixed=fixed, num_inference_steps=4, generator=seeds(0)[0]))
    assert all(torch.equal(frame.sequences[fixed], ids[fixed]) for frame in frames)
    assert (frames[0].sampled_tokens[~fixed] != MASK).all()


@pytest.mark.parametrize("mode", ["mdlm", "gstar_loop"])
def test_where_nothing_is_masked_nothing_is_done(mode, pipe):
    out = pipe(mode)(infill="a b c", return_history=True)
    assert out.texts == ["a b c"] and out.history == [] and out.denoiser_nfe.tolist() == [0]


def test_unconditional_and_messages(pipe):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokens = tokenizer(chat_template=template)
    made = pipe(tokens=tokens)
    assert made(batch_size=3, num_return_sequences=2, generator=seeds(1)[0], **OPTIONS).sequences.shape == (6, 10)
    talk = [{"role": "user", "content": "a b"}]
    expected = made(prompt="a b ", generator=seeds(1), **OPTIONS).sequences
    assert torch.equal(made(messages=talk, generator=seeds(1), **OPTIONS).sequences, expected)
    assert made(messages=[talk, talk], generator=seeds(1, 1), **OPTIONS).sequences.tolist() == [*expected.tolist()] * 2


def test_a_masked_prompt_is_filled_in_too_when_allowed(pipe):
    made = pipe()
    out = made(prompt="a <mask> b", allow_masked_prompt=True, generator=seeds(1)[0], **OPTIONS)
    assert out.sequences.shape == (1, 13) and not (out.sequences == MASK).any()
    assert out.sequences[0, 0] == 3 and out.sequences[0, 2] == 4


def test_blocks_are_written_from_left_to_right(pipe):
    frames = list(pipe("gstar_plus").stream(prompt="a", block_length=4, generator=seeds(1)[0], **OPTIONS))
    done = 0
    for frame in frames:
        masked = (frame.sequences == MASK)[0]
        before = masked[: 4 * done].any()
        assert not before
        while done < 3 and not masked[: min(4 * done + 4, 10)].any() and frame.phase in ("fill",):
            done += 1
    assert not (frames[-1].sequences == MASK).any()
    first = next(frame for frame in frames if (frame.sequences[0, 4:] != MASK).any())
    assert not (first.sequences[0, :4] == MASK).any()


def test_prompt_tokens_are_seen(pipe):
    made = pipe("mdlm")
    a, b = (made(prompt=prompt, generator=seeds(1), **OPTIONS).sequences for prompt in ("a b c d", "w v u t"))
    assert not torch.equal(a, b)


class Told:
    """A denoiser with given logits; remembers what it was asked."""

    def __init__(self, logits):
        self.table, self.asked = logits, []
        self.config = SimpleNamespace(vocab_size=logits.shape[-1], mask_token_id=MASK)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids, attention_mask=None):
        self.asked.append(input_ids.clone())
        return SimpleNamespace(logits=self.table[: input_ids.shape[1]].expand(len(input_ids), -1, -1).clone())

    __call__ = forward


def told(logits, mode="mdlm", tokens=None, **options):
    made = GStarPipeline.__new__(GStarPipeline)
    GStarPipeline.__init__(made, None, StarShapedScheduler(mode=mode), tokens, None, **options)
    made.denoiser = Told(logits)
    made.set_progress_bar_config(disable=True)
    return made


def peaks(*tokens):
    """Logits whose most probable tokens are these, by far."""
    return 50.0 * torch.nn.functional.one_hot(torch.tensor(tokens), len(WORDS)).float()


def test_logits_are_shifted_by_one_for_dream():
    logits = peaks(3, 4, 5, 6, 7, 8)
    plain = told(logits)(input_ids=torch.tensor([[9, 9]]), gen_length=4)
    shifted = told(logits, right_shift_logits=True)(input_ids=torch.tensor([[9, 9]]), gen_length=4)
    assert plain.sequences.tolist() == [[5, 6, 7, 8]] and shifted.sequences.tolist() == [[4, 5, 6, 7]]


def test_the_end_of_the_text_closes_it():
    made = told(peaks(4, EOS, 5, 6), tokens=tokenizer())
    out = made(gen_length=4, num_inference_steps=4, generator=seeds(0)[0])
    assert out.sequences.tolist() == [[4, EOS, PAD, PAD]] and out.texts == ["b"]
    open_end = made(gen_length=4, num_inference_steps=4, eos_early_stop=False, generator=seeds(0)[0])
    assert open_end.sequences.tolist() == [[4, EOS, 5, 6]] and open_end.texts == ["b"]
    # at the boundary of the prompt the answer is empty
    made = told(peaks(9, EOS, 5, 6), tokens=tokenizer())
    assert made(prompt="a", gen_length=3).texts == [""]


def test_rows_that_have_ended_write_no_further_blocks():
    made = told(peaks(4, EOS, 5, 6, 7, 8), tokens=tokenizer())
    out = made(gen_length=6, block_length=2, num_inference_steps=1)
    assert out.sequences.tolist() == [[4, EOS, PAD, PAD, PAD, PAD]] and out.denoiser_nfe.tolist() == [1]


def test_an_end_of_text_that_may_be_taken_back_closes_nothing():
    made = told(peaks(4, EOS, 5, 6), mode="star", tokens=tokenizer())
    frames = list(made.stream(gen_length=4, num_inference_steps=5))
    # tokens behind it are still written and taken back in every step
    assert not any((frame.sequences == PAD).any() for frame in frames[:-2])
    assert frames[-1].sequences.tolist() == [[4, EOS, PAD, PAD]]


def test_a_row_that_did_not_change_is_not_computed_again(pipe):
    made = pipe("mdlm")
    out = made(prompt=["a", "b"], gen_length=3, num_inference_steps=60, generator=seeds(1, 2), eos_early_stop=False)
    # a chain of 3 positions changes at most 3 times, and is computed before each change and no more
    assert (out.denoiser_nfe <= 4).all()
    conditioned = pipe("mdlm", denoiser=mdlm(time_conditioning=True))
    out = conditioned(prompt="a", gen_length=3, num_inference_steps=60, generator=seeds(1), eos_early_stop=False)
    assert out.denoiser_nfe > 20


@pytest.mark.parametrize(("mode", "block"), [("gstar_loop", None), ("mdlm", 3), ("low_confidence", 2)])
def test_skipping_changes_no_token(mode, block, pipe):
    made = pipe(mode)
    call = {"prompt": ["a", "b c"], "block_length": block, **OPTIONS}
    skipped = made(generator=seeds(1, 2), **call).sequences
    made.denoiser.config.time_conditioning = True  # only the pipeline reads this: it then computes every step
    made.denoiser.forward = _without_sigma(made.denoiser.forward)
    assert torch.equal(made(generator=seeds(1, 2), **call).sequences, skipped)


def _without_sigma(forward):
    def call(input_ids, sigma=None, **options):
        model = forward.__self__
        model.config.time_conditioning = False
        out = forward(input_ids, **options)
        model.config.time_conditioning = True
        return out

    return call


@pytest.mark.parametrize("mode", ["mdlm", "gstar_plus"])
def test_a_cached_prompt_changes_no_token(mode, pipe):
    made = pipe(mode, denoiser=mdlm(prefix_attention="causal"))
    out = made(prompt=["a b c d e f", "g h"], generator=seeds(1, 2), **OPTIONS)
    made._prefill = lambda chain: None
    again = made(prompt=["a b c d e f", "g h"], generator=seeds(1, 2), **OPTIONS)
    assert torch.equal(again.sequences, out.sequences)


def test_guidance_is_a_mixture_of_logits_with_and_without_the_prompt(pipe):
    made = pipe("mdlm")
    # one step, the most probable: the answer is the argmax of the mixture
    out = made(prompt="a b", gen_length=3, num_inference_steps=1, temperature=0, guidance_scale=3.0)
    x = torch.tensor([[3, 4, MASK, MASK, MASK], [MASK] * 5])
    given, alone = made.denoiser(x).logits[..., 2:, :].detach().clone().unbind(0)
    mixed = alone + 3.0 * (given - alone)
    mixed[:, MASK] = -math.inf  # infinity less infinity is not a number
    assert torch.equal(out.sequences[0], mixed.argmax(-1))
    assert out.denoiser_nfe.tolist() in ([2], [4])  # two passes, and two more if a mask was left
    plain = made(prompt="a b", gen_length=3, num_inference_steps=1, temperature=0).sequences[0]
    assert torch.equal(plain, given.argmax(-1))


def test_logits_processors_see_masked_positions(pipe):
    banned = list(range(3, 20))
    made = pipe("star_plus")
    out = made(prompt="a", logits_processor=SuppressTokensLogitsProcessor(banned), generator=seeds(1)[0], **OPTIONS)
    assert not torch.isin(out.sequences, torch.tensor(banned)).any()
    with pytest.raises(ValueError, match="`model_output` must leave a token to sample"):
        made(prompt="a", logits_processor=[SuppressTokensLogitsProcessor(list(range(len(WORDS))))], **OPTIONS)


def test_a_vocabulary_padded_beyond_the_tokenizer_is_not_sampled(pipe):
    made = pipe(denoiser=mdlm(vocab_size=len(WORDS) + 30))
    out = made(prompt="a", gen_length=40, num_inference_steps=4, eos_early_stop=False, generator=seeds(1)[0])
    assert out.sequences.max() < len(WORDS)


def test_a_head_alone_shares_the_denoiser(pipe):
    made = pipe("gstar_plus", num_layers=0)
    out = made(prompt="a b", generator=seeds(1), **OPTIONS)
    assert (out.predictor_nfe >= 2).all()
    state = [frame for frame in made.stream(prompt="a b", generator=seeds(1), **OPTIONS) if frame.phase == "guided"][0]
    x = torch.cat((torch.tensor([[3, 4]]), state.sampled_tokens), 1)
    hidden = made.denoiser(x, output_hidden_states=True).hidden_states[-1]
    expected = made.error_predictor(hidden_states=hidden).logits[:, 2:]
    torch.testing.assert_close(state.error_logits, expected.float().detach(), rtol=0, atol=1e-6)


def test_an_untrained_predictor_is_the_unguided_sampler(pipe):
    made = pipe("gstar_plus")
    made.error_predictor = ErrorPredictor.from_denoiser(made.denoiser, num_layers=1).eval().double()
    led = made(prompt="a b", generator=seeds(1), **OPTIONS)
    plain = pipe("star_plus", denoiser=made.denoiser)(prompt="a b", generator=seeds(1), **OPTIONS)
    assert torch.equal(led.sequences, plain.sequences) and (led.remask_counts > 0).all()


def test_history_and_stream_are_the_same_frames(pipe):
    made = pipe("gstar_loop")
    out = made(prompt="a", return_history=True, generator=seeds(1), **OPTIONS)
    frames = list(made.stream(prompt="a", generator=seeds(1), **OPTIONS))
    assert len(frames) == len(out.history) and [f.step for f in frames][:8] == list(range(8))
    for ours, streamed in zip(out.history, frames, strict=True):
        assert torch.equal(ours.sequences, streamed.sequences) and ours.phase == streamed.phase
    assert torch.equal(frames[-1].sequences, out.sequences)
    assert int(sum(frame.remask_index.sum() for frame in frames)) == int(out.remask_counts.sum()) > 0
    masked = torch.ones(1, 10, dtype=torch.bool)
    for frame in frames:
        assert not (frame.transfer_index & ~masked).any() and not (frame.remask_index & masked).any()
        masked = frame.sequences == MASK
        assert (frame.error_logits is not None) == (frame.phase == "guided")


def test_callbacks_see_and_replace_the_sample(pipe):
    made, seen = pipe("mdlm"), []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, timestep, sorted(tensors)))
        assert pipeline is made
        return {"sample": torch.full_like(tensors["sample"], 7)} if step == 2 else {}

    names = ["sample", "sampled_tokens", "transfer_index", "remask_index", "error_logits"]
    assert names == made._callback_tensor_inputs
    out = made(
        prompt="a",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
        generator=seeds(1),
        **OPTIONS,
    )
    assert (out.sequences == 7).all() and [s[0] for s in seen] == [0, 1, 2] and seen[0][2] == sorted(names)


def test_pipeline_callbacks_are_accepted_and_may_interrupt(pipe):
    class Stop(PipelineCallback):
        tensor_inputs = ["sample"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._interrupt = step_index == 1
            return callback_kwargs

    made = pipe("mdlm")
    out = made(prompt="a", callback_on_step_end=Stop(None, 1), return_history=True, **OPTIONS)
    assert len(out.history) == 2 and (out.sequences == MASK).any()


def test_dict_tuple_outputs_equivalent(pipe):
    made = pipe()
    output = made(prompt="a", generator=seeds(1), **OPTIONS)
    values = made(prompt="a", generator=seeds(1), return_dict=False, **OPTIONS)
    assert torch.equal(values[0], output.sequences) and values[1] == output.texts


def test_progress_bar_settings_are_left_alone(pipe, capsys):
    made = pipe()
    made.set_progress_bar_config(desc="here", leave=False)
    made(prompt="a", **OPTIONS)
    assert made._progress_bar_config == {"desc": "here", "leave": False}
    assert "here" in capsys.readouterr().err


def test_to_dtype_half_precision_no_nan(pipe):
    made = pipe("gstar_plus").to(torch.bfloat16)
    assert made.denoiser.dtype == torch.bfloat16 == made.error_predictor.dtype
    assert not (made(prompt="a", generator=seeds(1)[0], **OPTIONS).sequences == MASK).any()


def test_components_function(pipe):
    made = pipe("gstar_plus")
    assert set(made.components) == {"denoiser", "scheduler", "tokenizer", "error_predictor"}
    again = GStarPipeline(**made.components)
    again.set_progress_bar_config(disable=True)
    a, b = (p(prompt="a", generator=seeds(1), **OPTIONS).sequences for p in (made, again))
    assert torch.equal(a, b)


class Dream(Qwen2ForCausalLM):
    """Dream's kind: a causal model that looks both ways and still writes token i at position i - 1."""

    def forward(self, input_ids, attention_mask=None, **options):
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        both = keep.bool()[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1)
        return super().forward(input_ids, attention_mask=both, **options)


DENOISERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE, **OTHERS)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHAPE, **OTHERS, cls_token_id=1, sep_token_id=1, local_attention=64)
    ),
    # LLaDA is a Llama without a causal mask, and so is EuroBERT
    "llada": lambda: EuroBertForMaskedLM(EuroBertConfig(**SHAPE, **OTHERS, mask_token_id=MASK)),
    "dream": lambda: Dream(Qwen2Config(**SHAPE, **OTHERS, num_key_value_heads=2)),
}


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("num_layers", [0, 1])
def test_denoisers_of_others_work_with_ragged_prompts(kind, num_layers, pipe):
    if kind == "dream" and num_layers:
        pytest.skip("a copy of a causal class would look one way")
    made = pipe(
        "gstar_plus", denoiser=randomised(DENOISERS[kind]()), num_layers=num_layers, right_shift_logits=kind == "dream"
    )
    together = made(prompt=["a b c d", "e"], generator=seeds(1, 2), **OPTIONS)
    assert not (together.sequences == MASK).any()
    alone = made(prompt="e", generator=seeds(2), **OPTIONS)
    assert torch.equal(alone.sequences[0], together.sequences[1])
    # tokens on both sides of a mask matter to it
    a, b = (made(infill=text, temperature=0, num_inference_steps=1).sequences for text in ("<mask> a", "<mask> w"))
    assert a.shape == b.shape == (1, 2)


CONTEXT = {"max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a", "messages": []}, r"at most one of `prompt`, .* got \['prompt', 'messages'\]"),
        ({"prompt": "a", "gen_length": 0}, "`gen_length` must be a whole number > 0, got 0"),
        ({"prompt": "a", "num_inference_steps": 0}, "`num_inference_steps` must be a whole number > 0, got 0"),
        ({"prompt": "a", "block_length": -1}, "`block_length` must be a whole number > 0, got -1"),
        ({"prompt": "a", "num_return_sequences": 1.5}, "`num_return_sequences` must be .* got 1.5"),
        ({"prompt": "a", "temperature": -1.0}, "`temperature` must be a number >= 0, got -1.0"),
        ({"prompt": "a", "top_p": 0}, r"`top_p` must be in \(0, 1\], got 0"),
        ({"prompt": "a", "guidance_scale": -1.0}, "`guidance_scale` must be a number >= 0, got -1.0"),
        ({"prompt": "a", "output_type": "pil"}, "`output_type` must be 'text' or 'seq', got 'pil'"),
        ({"prompt": []}, "`prompt` must hold at least one text, got an empty list"),
        ({"prompt": "a <mask>"}, r"`prompt` must not hold the mask \(id 2\)"),
        ({"prompt": "a b c d e f g h", "gen_length": 9}, "must fit the denoiser's 16 positions, got 8 and 9"),
        ({"prompt": "a", "attention_mask": torch.ones(1, 1)}, "`attention_mask` must be None unless tokens are given"),
        ({"prompt": "a", "fixed": torch.ones(1, 1)}, "`fixed` must be None unless `infill` is given as tokens"),
        ({"input_ids": torch.ones(1, 2)}, "`input_ids` must be int64 token ids .* got torch.float32"),
        ({"input_ids": torch.ones(1, 2, 3, dtype=torch.long)}, r"`input_ids` must be .* got torch.int64 of shape"),
        ({"input_ids": [[1, 2]]}, "`input_ids` must be a tensor of int64, got list"),
        (
            {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
            r"`attention_mask` must have the shape of the tokens, \(1, 2\), got \(1, 3\)",
        ),
        (
            {"infill": torch.ones(1, 2, dtype=torch.long), "fixed": torch.ones(1, 2)},
            "`fixed` must be a bool tensor, got torch.float32",
        ),
        ({"prompt": "a", "mask_token_id": 99}, r"`mask_token_id` must be in \[0, 26\), .* got 99"),
        ({"prompt": "a", "mask_token_id": PAD}, "`mask_token_id` must differ from the tokenizer's pad token, got 0"),
        ({"prompt": ["a", "b"], "generator": seeds(1)}, "`generator` must be one generator or a list of 2, .* got 1"),
        (
            {"prompt": "a", "callback_on_step_end_tensor_inputs": ["latents"]},
            r"`callback_on_step_end_tensor_inputs` must be among .* got \['latents'\]",
        ),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_before_the_model_runs(options, said, pipe):
    made = pipe(denoiser=mdlm(**CONTEXT))
    made.denoiser.forward = None
    with pytest.raises(ValueError, match=said):
        made(**{"gen_length": 4, **options})


def test_what_a_pipeline_lacks_is_named(pipe):
    made = pipe("gstar_plus")
    made.error_predictor = None
    with pytest.raises(ValueError, match="`error_predictor` must be there for the guided mode 'gstar_plus', got None"):
        made(prompt="a")
    with pytest.raises(ValueError, match="`prompt` must be given as tokens, since the pipeline has no tokenizer"):
        GStarPipeline(mdlm(), StarShapedScheduler(mode="mdlm"), None, None)(prompt="a")
    bare = GStarPipeline(randomised(DENOISERS["bert"]()), StarShapedScheduler(mode="mdlm"), None, None)
    with pytest.raises(ValueError, match="`mask_token_id` must be given: neither pipeline, tokenizer nor"):
        bare(gen_length=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lenght'"):
        made.stream(prompt="a", lenght=3)


def test_a_predictor_of_another_denoiser_is_refused():
    other = ErrorPredictor.from_denoiser(mdlm(hidden_size=16), num_layers=0)
    with pytest.raises(ValueError, match="`error_predictor` must have the denoiser's hidden_size, 32, got 16"):
        GStarPipeline(mdlm(), StarShapedScheduler(), None, other)
    other = ErrorPredictor.from_denoiser(mdlm(vocab_size=40))
    with pytest.raises(ValueError, match="`error_predictor` must have the denoiser's vocab_size, 26, got 40"):
        GStarPipeline(mdlm(), StarShapedScheduler(), None, other)
