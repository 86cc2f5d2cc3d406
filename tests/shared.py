"""What tests share: random checkpoints of several architectures and artifacts over them, small enough to build."""

import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
import zlib

# Read when trackio is imported, which TRL's GRPOTrainer does.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import bitsandbytes as bnb
import processes
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    dynamic_module_utils,
)

import rlhf_pipeline.models.tiny
from rlhf_pipeline.models import adapters, base
from rlhf_pipeline.models.roles import SharedBase
from rlhf_pipeline.models.staged import StagedBase
from rlhf_pipeline.models.tokenizer import load_tokenizer
from rlhf_pipeline.recipe.schema import Model
from rlhf_pipeline.run.launch import Launcher

# Models that Transformers alone loads are compared with ours, which are never packed anew: see `models.loading`.
bnb.nn.modules.has_avx512bf16 = lambda: False

TINY = Path(rlhf_pipeline.models.tiny.__file__).parent
PAD, EOS = 0, 1  # of the shipped tokenizer, which all checkpoints here share
# Large initial weights, so that logits differ by far more than the tolerances of the tests.
COMMON = {"vocab_size": 1024, "initializer_range": 0.3, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
ROTARY = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**ROTARY, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**ROTARY, head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    # A window shorter than most rows of the tests.
    "mistral": MistralConfig(**ROTARY, sliding_window=6),
    # Dropout that is passed to functions as a number, and an embedding narrower than the hidden states.
    "opt": OPTConfig(
        **COMMON,
        init_std=0.3,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.3,
        attention_dropout=0.3,
    ),
    # Logits that are capped after the output embedding.
    "gemma2": Gemma2Config(
        **ROTARY, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, final_logit_softcapping=5.0
    ),
}


class Artifacts(NamedTuple):
    """What the earlier stages of a run would have left: the model's settings, an SFT and a reward artifact."""

    spec: Model
    init: Path
    reward: Path


@pytest.fixture(scope="session", autouse=True)
def own_cache_home(tmp_path_factory) -> Iterator[None]:
    """Keep what the package remembers for the user out of the user's real home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_MODULES_CACHE", modules := str(tmp_path_factory.mktemp("modules")))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)  # read when the library was imported
        yield
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def benchmark(name: str) -> ModuleType:
    """A script in `benchmarks/` as a module; its folder is no package."""
    file = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def closed_form() -> ModuleType:
    """`benchmarks/closed_form.py`."""
    return benchmark("closed_form")


@pytest.fixture(scope="session")
def labeller() -> ModuleType:
    """`benchmarks/labeller.py`."""
    return benchmark("labeller")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo what a test does to the environment: a command that is called in this process, not in one of its own, sets
    which devices are visible, say, and another test would take them for the user's.
    """
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory: pytest.TempPathFactory, own_cache_home: None) -> Iterator[Launcher]:
    """One server to fork workers from for all tests of this process, which would each import for seconds."""
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "0123456789" * 4,
        "TRACKIO_DIR": os.environ["TRACKIO_DIR"],
    }
    with processes.WarmLauncher(tmp_path_factory.mktemp("server") / "log.txt", environment) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, warm_server: Launcher) -> Path:
    """The run directory of a short run of all four stages on the tiny checkpoint; not to be written to."""
    import short_run  # after this file has set the environment

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processes of one session share it
        shared = shared.parent
    folder = shared / "tiny_run"
    with (shared / "tiny_run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            short_run.write_data(folder)
            code, said = short_run.run_warm(warm_server, folder, "tiny", *short_run.OVERRIDES, report=True)
            assert code == 0, said
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def load_staged() -> Callable[[Model, dict[str, Path]], StagedBase]:
    """A `StagedBase` that is loaded once for each model, template and names of adapters."""
    bases: dict[tuple, StagedBase] = {}

    def load(spec: Model, artifacts: dict[str, Path]) -> StagedBase:
        template = Path(spec.chat_template).read_text() if spec.chat_template else None
        key = spec.path, template, tuple(artifacts)
        if key not in bases:
            bases[key] = StagedBase(spec, artifacts)
        return bases[key]

    return load


@pytest.fixture(scope="session")
def randomise() -> Callable[[PeftModel], None]:
    """A function that gives a model's fresh adapter an effect: its B matrices start as zeros."""

    @torch.no_grad()
    def draw(model: PeftModel) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)

    return draw


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(TINY / "checkpoint"))


class Checkpoints(dict[str, Path]):
    """A folder with model and tokenizer for each architecture, made when it is first asked for."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __missing__(self, shape: str) -> Path:
        self[shape] = self.folder / shape
        with torch.random.fork_rng():
            torch.manual_seed(list(CONFIGS).index(shape))
            AutoModelForCausalLM.from_config(CONFIGS[shape]).save_pretrained(self[shape])
        self.tokenizer.save_pretrained(self[shape])
        return self[shape]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"), tokenizer)


@pytest.fixture(scope="session")
def make_artifacts(tmp_path_factory, checkpoints, tokenizer, randomise) -> Callable[..., Artifacts]:
    """A function that makes an SFT and a reward artifact that both change what the base says; made once each."""
    made: dict[tuple, Artifacts] = {}

    def make(shape: str = "llama", quantization: str = "none", ranks: tuple[int, int] = (4, 8)) -> Artifacts:
        key = (shape, quantization, ranks)
        if key not in made:
            torch.manual_seed(zlib.crc32(repr(key).encode()))  # the same whichever test asks first
            folder = tmp_path_factory.mktemp("artifacts")
            spec = Model(path=str(checkpoints[shape]), quantization=quantization)
            init_lora, reward_lora = ({"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"} for r in ranks)
            policy = adapters.with_policy_adapter(base.load_base(spec, tokenizer), init_lora, None)
            randomise(policy)
            adapters.save_adapter(policy, "default", folder / "init", tokenizer)
            reward = adapters.with_reward_adapter(base.load_base(spec, tokenizer, "score"), reward_lora, None)
            randomise(reward)
            adapters.save_adapter(reward, "default", folder / "reward", tokenizer)
            made[key] = Artifacts(spec, folder / "init", folder / "reward")
        return made[key]

    return make


def lora_of(artifact: Path) -> dict[str, Any]:
    """What a recipe would say of the shape of an artifact of `make_artifacts`."""
    config = LoraConfig.from_pretrained(str(artifact))
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": "all-linear"}


@pytest.fixture(scope="session")
def share(tokenizer) -> Callable[[Artifacts], SharedBase]:
    """A function that puts four roles on a freshly loaded base; `one_trunk` as in `SharedBase`."""

    def make(artifacts: Artifacts, one_trunk: bool = False) -> SharedBase:
        model = base.load_base(artifacts.spec, tokenizer)
        shapes = lora_of(artifacts.init), lora_of(artifacts.reward)
        return SharedBase(model, shapes[0], artifacts.init, [(artifacts.reward, shapes[1])], one_trunk)

    return make


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Three sequences of unequal length, padded on the left, with positions that count the real tokens."""
    ids = torch.randint(5, 1024, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - mask}
