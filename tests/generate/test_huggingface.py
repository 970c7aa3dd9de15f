"""Conversion from and to Hugging Face, judged by transformers itself: it loads what we export, and we load what it saves."""

import json
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from little_run import make_run, sit
from ranks import run_ranks
from test_generate_run import save_model

from llm.chat.prompt import chat_ids
from llm.checkpoint.resume import open_checkpoint
from llm.config import ModelConfig, load_config
from llm.corpus.conversations import CHATML, Conversation, Template, Turn, render, to_jinja
from llm.dist import World
from llm.generate.generator import generate_rows
from llm.generate.load import load_run
from llm.generate.sampling import Sampling
from llm.log import UserError
from llm.model.huggingface import Inexpressible, from_config_json, to_config_json
from llm.model.init import build_model
from llm.tokenizer import load_tokenizer
from llm.tokenizer.train import train_bpe
from tools.export_hf import export
from tools.import_hf import import_folder

transformers = pytest.importorskip("transformers")

SMALL = {"n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 40, "seq_len": 64, "init_std": 0.25}
ROPE = SMALL | {"n_kv_heads": 2, "norm_eps": 1e-6}
LAYER_NORM = SMALL | {"norm": "layernorm", "mlp": "gelu", "bias": True}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_seq_len": 16, "rope_theta": 500.0}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_seq_len": 32, "rope_theta": 500.0}
MODELS = {
    "gpt2": LAYER_NORM | {"positions": "learned", "tie_embeddings": True},
    "llama-2": ROPE | {"n_kv_heads": 4},
    "llama-3": ROPE | LLAMA3 | {"d_head": 10, "tie_embeddings": True},
    "llama-linear": ROPE | {"rope_scaling": "linear", "rope_factor": 2.0, "bias": True},
    "llama-yarn": ROPE | YARN,
    "mistral": ROPE | {"sliding_window": 5},
    "qwen3": ROPE | {"qk_norm": True, "d_head": 8, "tie_embeddings": True, "rope_theta": 1e6},
    "phi": LAYER_NORM | {"parallel_blocks": True, "head_bias": True, "rotary_fraction": 0.4, "d_model": 40},
}
FAMILY = {name: name.partition("-")[0] for name in MODELS}
ROOT = Path(__file__).parents[2]
PROMPTS = ["def main(x):", "a", "for i in range(10):\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["plain bytes"], vocab_size=256).tokenizer


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    """(name, our run's folder, its export)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build_model(ModelConfig(**MODELS[request.param]).with_vocab(tokenizer.vocab_size), seed=3)
    stir(model)
    save_model(folder / "run", 1, model, tokenizer)
    export(folder / "run", folder / "hf", shard_bytes=20_000)
    return request.param, folder / "run", folder / "hf"


def stir(model) -> None:
    """Make every weight matter: norms not one, biases not zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)


def some_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, 48), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_logits(ours, theirs) -> None:
    tokens = some_tokens(ours.cfg.vocab_size)
    logits = ours(tokens)
    assert logits.std() > 0.1
    torch.testing.assert_close(theirs(tokens).logits, logits, atol=1e-4, rtol=0)


def test_transformers_computes_the_same_logits_from_the_exported_folder(exported):
    name, run, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.model_type == FAMILY[name]
    assert_same_logits(load_run(run)[0], theirs)


@torch.no_grad()
def test_transformers_writes_the_same_tokens_alone_and_in_a_batch_with_and_without_a_cache(exported):
    _, run, folder = exported
    model, tokenizer, _ = load_run(run, packed=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = [tokenizer.encode(text).tolist() for text in PROMPTS]
    ends = set(theirs.generation_config.eos_token_id)

    def told(texts: list[str], **how) -> list[list[int]]:
        given = their_tokenizer(texts, return_tensors="pt", padding=True)
        rows = theirs.generate(**given, max_new_tokens=24, do_sample=False, **how)[:, given.input_ids.shape[1] :].tolist()
        return [list(takewhile(lambda i: i not in ends, row)) for row in rows]

    def ours(given: list[list[int]]) -> list[list[int]]:
        rows = [[] for _ in given]
        for row, token in generate_rows(model, tokenizer, given, max_tokens=24, sampling=Sampling(temperature=0), seed=0, stop_ids=ends):
            rows[row].append(token)
        return rows

    together = told(PROMPTS)
    assert sum(map(len, together)) > 24 and len({tuple(row) for row in together}) == len(PROMPTS)
    assert told(PROMPTS, use_cache=False) == together
    assert [told([text])[0] for text in PROMPTS] == together
    assert ours(prompts) == together
    assert [ours([prompt])[0] for prompt in prompts] == together
    assert [without_cache(load_run(run)[0], tokenizer, prompt, ends, 24) for prompt in prompts] == together


def without_cache(model, tokenizer, prompt: list[int], ends: set[int], n: int) -> list[int]:
    """The whole text is read anew for each token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n:
        found = int(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax())
        if found in ends:
            break
        ids.append(found)
    return ids[len(prompt) :]


def test_what_was_exported_comes_back_bit_by_bit(exported, tmp_path):
    _, run, folder = exported
    import_folder(folder, tmp_path / "back")
    before, after = load_run(run), load_run(tmp_path / "back")
    assert after[1].fingerprint == before[1].fingerprint
    assert after[0].cfg.model_copy(update={"model_name": "custom"}) == before[0].cfg
    for (name, a), b in zip(before[0].named_parameters(), after[0].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_transformers_made_is_the_same_here(name, tokenizer, exported_tokenizer, tmp_path):
    cfg = ModelConfig(**MODELS[name]).with_vocab(tokenizer.vocab_size)
    config = transformers.AutoConfig.for_model(**to_config_json(cfg))
    torch.manual_seed(6)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")  # their config.json, in their words
    exported_tokenizer.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    model, ours, _ = load_run(tmp_path / "run")
    assert_same_logits(model, theirs)
    assert ours.fingerprint == tokenizer.fingerprint


@pytest.fixture(scope="module")
def exported_tokenizer(tokenizer, tmp_path_factory):
    from llm.tokenizer.export import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(tokenizer, folder, 64, to_jinja(CHATML))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_chat_template_is_chatml_and_survives_the_way_back_and_forth(exported, tmp_path):
    _, _, folder = exported
    chat = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    import_folder(folder, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "again")
    for at in (folder, tmp_path / "again"):
        theirs = transformers.AutoTokenizer.from_pretrained(at)
        assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
        assert theirs.eos_token == "<|endoftext|>" and theirs.pad_token == "<|pad|>"


ODD = Template(
    "[\"{role}\" \\\\ {{%}}]\n{content}<|im_end|> 😀 it's {role}\n",
    special=("<|im_end|>",), roles=(("user", "Hu\"man"), ("assistant", "Bot")), system="Be 'brief' \\n.",
)  # fmt: skip


@pytest.mark.parametrize("has_system", [True, False])
def test_the_template_of_the_fine_tuning_is_that_of_the_exported_tokenizer(tokenizer, tmp_path, has_system):
    save_model(tmp_path / "run", 1, build_model(ModelConfig(**ROPE).with_vocab(tokenizer.vocab_size), seed=3), tokenizer, ODD)
    export(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = (*[Turn("system", "S")] * has_system, Turn("user", "a {{ 1 }} \"b\""), Turn("assistant", "c\n"), Turn("user", "d"))
    ours = "".join(segment.text for segment in render(Conversation(turns), ODD))
    opening = '["Bot" \\\\ {{%}}]\n'
    chat = [turn._asdict() for turn in turns]
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == ours + opening
    assert theirs.apply_chat_template(chat, add_generation_prompt=True).input_ids == chat_ids(turns, ODD, tokenizer, 10**6)[0]
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["eos_token_id"] == sorted({tokenizer.eos_id, tokenizer.special_ids["<|im_end|>"]})


@pytest.mark.parametrize("theirs", [{}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}])
def test_what_was_imported_and_taught_to_chat_ends_with_a_turn_as_well(tokenizer, tmp_path, theirs):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(theirs | {"temperature": 0.5}))
    imported = load_tokenizer(tmp_path)
    save_model(tmp_path / "run", 1, build_model(ModelConfig(**ROPE).with_vocab(tokenizer.vocab_size), seed=3), imported, ODD)
    export(tmp_path / "run", tmp_path / "hf")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    its_own = {7, 8} if theirs.get("eos_token_id") == [7, 8] else {7} if theirs.get("eos_token_id") else set()
    assert found.temperature == 0.5 and set(found.eos_token_id) == its_own | {tokenizer.eos_id, tokenizer.special_ids["<|im_end|>"]}


# ---------------------------------------------------------------- config.json of published models

PUBLISHED = {  # as they lie on the hub, written by transformers 4
    "tinyllama-1.1b": {
        "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"},
    },
    "phi-2": {
        "model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gpt2-124m": {
        "model_type": "gpt2", "activation_function": "gelu_new", "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset_of_its_name(name):
    read = from_config_json(PUBLISHED[name] | {"quantization_config": None}, "config.json")  # some libraries write what there is not
    preset = load_config(preset=name).model
    assert read.model_copy(update={"model_name": name, "seq_len": preset.seq_len, "vocab_size": preset.vocab_size}) == preset


LLAMA_JSON, GPT2_JSON = PUBLISHED["tinyllama-1.1b"], PUBLISHED["gpt2-124m"]


@pytest.mark.parametrize(("config", "complaint"), [
    ({"model_type": "gemma2"}, "model_type is 'gemma2', but only llama"),
    (LLAMA_JSON | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (LLAMA_JSON | {"attention_bias": True}, "attention_bias and mlp_bias are"),
    (LLAMA_JSON | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    (LLAMA_JSON | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 0.7}}, "mscale 0.7"),
    (LLAMA_JSON | {"rope_scaling": "linear"}, "rope_scaling is 'linear', but should be an object"),
    (LLAMA_JSON | {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA_JSON | {"num_hidden_layers": None}, "n_layers"),
    (PUBLISHED["qwen3-0.6b"] | {"use_sliding_window": True}, "use_sliding_window is True"),
    (PUBLISHED["phi-2"] | {"qk_layernorm": True}, "qk_layernorm is True"),
    (GPT2_JSON | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
])  # fmt: skip
def test_a_config_that_says_what_we_have_no_equal_of_is_refused_by_the_key(config, complaint):
    with pytest.raises(Inexpressible, match=complaint):
        from_config_json(config, "config.json")


@pytest.mark.parametrize(("change", "complaint"), [
    ({"logit_softcap": 30.0}, r"nearest is llama, but for:\n  - model.logit_softcap is 30.0, there it is None"),
    ({"qk_norm": True, "sliding_window": 8}, r"nearest is mistral, but for:\n  - model.qk_norm is True"),
    ({"positions": "learned"}, "model.positions is learned, there it is rope"),
    ({"parallel_blocks": True}, "model.parallel_blocks is True"),
])  # fmt: skip
def test_a_model_that_no_family_expresses_is_refused_by_the_field(change, complaint):
    with pytest.raises(Inexpressible, match=complaint):
        to_config_json(ModelConfig(**ROPE | {"vocab_size": 384} | change))


def test_an_export_that_is_refused_leaves_nothing(tokenizer, tmp_path):
    model = build_model(ModelConfig(**ROPE | {"logit_softcap": 30.0}).with_vocab(tokenizer.vocab_size), seed=3)
    save_model(tmp_path / "run", 1, model, tokenizer)
    with pytest.raises(Inexpressible):
        export(tmp_path / "run", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_export_to_a_disk_without_room_is_told_in_words_and_leaves_nothing(tokenizer, tmp_path):
    save_model(tmp_path / "run", 1, build_model(ModelConfig(**ROPE).with_vocab(tokenizer.vocab_size), seed=3), tokenizer)
    command = f"ulimit -f 20; {sys.executable} {ROOT}/tools/export_hf.py run --out hf"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "error: hf: cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- folders that are not as they should be


@pytest.fixture
def llama_folder(tokenizer, tmp_path):
    model = build_model(ModelConfig(**ROPE).with_vocab(tokenizer.vocab_size), seed=3)
    save_model(tmp_path / "run", 1, model, tokenizer)
    export(tmp_path / "run", tmp_path / "hf")
    return tmp_path / "hf"


def edit_tensors(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def changed_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_an_index(folder: Path, content) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("damage", "complaint"), [
    (only_pickles, "pickles"),
    (lambda f: only_an_index(f, [1]), "cannot be read"),
    (lambda f: only_an_index(f, {"weight_map": {"a": 5}}), "cannot be read"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "cannot be read"),
    (lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "model.layers.1.mlp.up_proj.weight is missing"),
    (lambda f: edit_tensors(f, lambda t: t.update({"model.layers.1.odd.weight": torch.ones(2)})), "holds model.layers.1.odd.weight"),
    (lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(7)})), r"model.norm.weight is \(7,\)"),
    (lambda f: changed_config(f, vocab_size=128), "vocab_size is 128 but the tokenizer has 260"),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused_and_leaves_nothing(llama_folder, tmp_path, damage, complaint):
    damage(llama_folder)
    with pytest.raises(UserError, match=complaint):
        import_folder(llama_folder, tmp_path / "imported")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_a_folder_that_is_there_is_never_overwritten(llama_folder, tmp_path):
    for call in (lambda: import_folder(llama_folder, tmp_path / "run"), lambda: export(tmp_path / "run", llama_folder)):
        with pytest.raises(UserError, match="already there"):
            call()


def test_names_and_buffers_of_old_gpt2_files_are_understood(tokenizer, tmp_path):
    model = build_model(ModelConfig(**MODELS["gpt2"]).with_vocab(tokenizer.vocab_size), seed=3)
    save_model(tmp_path / "run", 1, model, tokenizer)
    export(tmp_path / "run", tmp_path / "hf")

    def make_old(tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

    edit_tensors(tmp_path / "hf", make_old)
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert torch.equal(load_run(tmp_path / "back")[0].blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_shorter_rows_give_the_same_logits_and_longer_ones_are_refused(llama_folder, tmp_path):
    import_folder(llama_folder, tmp_path / "short", seq_len=48)
    short, long = load_run(tmp_path / "short")[0], load_run(tmp_path / "run")[0]
    tokens = some_tokens(384)
    assert short.cfg.seq_len == 48
    torch.testing.assert_close(short(tokens), long(tokens))
    with pytest.raises(UserError, match="--seq-len 65: this model takes 1 to 64"):
        import_folder(llama_folder, tmp_path / "longer", seq_len=65)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_the_bits_are_said_in_the_config_and_rounded_once(llama_folder, tmp_path, dtype):
    export(tmp_path / "run", tmp_path / "half", dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    ours = load_run(tmp_path / "run")[0]
    assert torch.equal(theirs.lm_head.weight, ours.head.weight.to(kind))


# ---------------------------------------------------------------- going on


def train_from_an_import(world: World, root: Path) -> None:
    """A run, its export, that imported, a run from it; all under `root`."""
    checkpoints, data = root / "checkpoints", root / "data"
    sit(world, str(make_run(root)), ["total_step_budget=4"])
    export(checkpoints / "little", root / "hf")
    (root / "hf" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    import_folder(root / "hf", checkpoints / "imported")
    settings = ["eval_every=0", "save_every=0", "precision=fp32", "tensorboard=false", "device=cpu", "batch_tokens=32", "lr=1e-9"]
    overrides = [f"data_path={data}", "total_step_budget=2", *settings]
    sit(world, str(checkpoints / "imported" / "run.yaml"), overrides, init_from=str(checkpoints / "imported"))
    export(checkpoints / "imported-continued", root / "hf-again")


def test_training_goes_on_from_an_import_and_its_checkpoints_can_be_exported(tmp_path):
    run_ranks(train_from_an_import, 1, tmp_path, tmp_path)
    before, after = (open_checkpoint(tmp_path / "checkpoints" / name) for name in ("little", "imported-continued"))
    assert (before.manifest.step, after.manifest.step) == (4, 2)
    for name, _ in before.manifest.shapes:
        torch.testing.assert_close(after.reader.read_full(name), before.reader.read_full(name), atol=1e-6, rtol=0)  # lr 1e-9 moves little
    kept = json.loads((tmp_path / "hf-again" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.5


def train_sharded(world, config) -> None:
    sit(world, config, ["engine.zero_stage=3", "train.total_step_budget=2"])


def test_a_zero_3_checkpoint_of_two_ranks_is_exported_and_comes_back_bit_by_bit(tmp_path):
    run_ranks(train_sharded, 2, tmp_path, str(make_run(tmp_path / "run")))
    trained = open_checkpoint(tmp_path / "run" / "checkpoints" / "little")
    assert trained.manifest.world_size == 2
    export(trained.folder, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert dict(back.manifest.shapes) == dict(trained.manifest.shapes)
    assert all(torch.equal(back.reader.read_full(name), trained.reader.read_full(name)) for name, _ in trained.manifest.shapes)
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, load_run(trained.folder)[0](tokens), atol=1e-4, rtol=0)
