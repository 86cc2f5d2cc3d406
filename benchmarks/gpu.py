"""All that a GPU has to tell, in eight minutes at most, each figure printed and written as soon as it is there.

    python3 benchmarks/gpu.py --out figures                 # on a card of 24 GB or more
    python3 benchmarks/gpu.py --out figures --shape small   # the same way on any device, with small models

Phases in the order of what they are worth, each in a process of its own with a limit of its own, so that one that
fails, runs out of memory or hangs costs itself alone. In `--out` are then `results.jsonl`, a line for each figure, and
`results.md`, the same as tables, both whole after every phase. The exit code is 0 where every phase went through.

The models of eight billion parameters are random, of the shape of Llama-3.1-8B, and made on the card in NF4, layer by
layer. Peaks are those of PyTorch's allocator (`max_memory_allocated`), of a CPU the resident memory's.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # where the package is not installed
RESULTS, TABLE, PHASE = "results.jsonl", "results.md", "phase"
PEAKS = ("memory", "update")  # the figures with the peak of a phase
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
ALL_SECONDS = 480
AIM = 16 * 2**30  # bytes of a whole PPO update with four roles
# Dense matrix products in bfloat16, in 1e12 operations a second, as NVIDIA's data sheets have it, without sparsity.
NOMINAL = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "RTX 4090": 165.2, "L40S": 362.0,
           "L4": 121.0, "A10": 125.0, "RTX 3090": 71.0, "RTX 5090": 209.5, "B200": 2250.0}  # fmt: skip
NEEDED = ("torch", "transformers", "accelerate", "trl", "peft", "bitsandbytes", "datasets", "pydantic", "psutil")


@dataclass(frozen=True)
class Shape:
    """A random Llama and the work of one step: `batch` rows, or pairs, of `prompt` and `reply` tokens."""

    model: dict[str, int]
    batch: int
    prompt: int
    reply: int
    quantization: str = "nf4"
    dtype: str = "bfloat16"


SHAPES = {
    "8b": Shape(
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8},
        batch=4, prompt=512, reply=512,
    ),
    "small": Shape(
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2},
        batch=2, prompt=16, reply=16, dtype="float32",  # CPUs are slow in bfloat16
    ),
}  # fmt: skip


class Out:
    """Where figures go: to the screen, and to a file that is whole after each of them."""

    def __init__(self, folder: Path, phase: str, screen: TextIO | None = None) -> None:
        self.file, self.phase, self.screen = folder / RESULTS, phase, screen

    def tell(self, name: str, numbers: dict[str, Any]) -> None:
        """Print and write a figure, or several that belong together."""
        said = ", ".join(f"{key} {_shown(value)}" for key, value in numbers.items())
        print(f"  {name}: {said}", flush=True, file=self.screen)
        line = json.dumps({"phase": self.phase, "name": name, "numbers": numbers}, default=str)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


# The phases. Each imports what it needs: the process that starts them imports no torch.


def machine(out: Out, shape: Shape) -> None:
    """The card, the versions, and how fast it multiplies matrices in bfloat16."""
    import importlib.metadata as metadata
    import platform

    import torch

    versions = {name: metadata.version(name) for name in NEEDED}
    out.tell("versions", {"python": platform.python_version()} | versions)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        out.tell(
            "card",
            {"name": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda,
             "capability": ".".join(map(str, torch.cuda.get_device_capability()))},
        )  # fmt: skip
    else:
        out.tell("card", {"name": f"none: {torch.get_num_threads()} CPU threads"})
    out.tell("matrix rate", matrix_rate(8192 if shape is SHAPES["8b"] else 256))


def matrix_rate(size: int) -> dict[str, float]:
    """In 1e12 operations a second: measured on random bfloat16 matrices, and the nominal one where it is known."""
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=place) for _ in range(2))
    for _ in range(3):
        one @ other
    synchronise()
    started, times = time.perf_counter(), 10
    for _ in range(times):
        one @ other
    synchronise()
    found = {"measured_tflops": 2 * size**3 * times / (time.perf_counter() - started) / 1e12}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    nominal = next((rate for card, rate in NOMINAL.items() if all(word in name for word in card.split())), None)
    return found | ({"nominal_tflops": nominal} if nominal else {})


def synchronise() -> None:
    """Wait for the GPU, so that a clock tells when it was done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def checks(out: Out, shape: Shape) -> None:
    """What must hold on the card; see `gpu_checks`."""
    import gpu_checks

    failed = []
    for check in gpu_checks.CHECKS:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            try:
                numbers = check(Path(folder)) | {"ok": True}
            except gpu_checks.NotHere as reason:
                numbers = {"not here": str(reason)}
            except Exception as error:
                numbers = {"ok": False, "said": f"{type(error).__name__}: {error}"[:500]}
                failed.append(check.__name__)
        out.tell(check.__name__.replace("_", " "), numbers | {"seconds": time.perf_counter() - started})
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def ppo(out: Out, shape: Shape) -> None:
    """One PPO update of four roles on one base, with gradient checkpointing: bytes, seconds, tokens a second."""
    from memory import LORA, save_random_reward
    from ppo_memory import Recorder, make_trainer

    from rlhf_pipeline.models.roles import SharedBase

    with tempfile.TemporaryDirectory(prefix="gpu-ppo-") as name:
        folder = Path(name)
        base, tokenizer, config, parameters = _random(out, shape)
        save_random_reward(folder / "reward", config)
        shared = SharedBase(base, LORA, None, [(folder / "reward", LORA)])
        work = ppo_shape(shape)
        make_trainer("ours", _less(work), shared, tokenizer, folder).train()  # what is set up once is not counted
        trainer = make_trainer("ours", work, shared, tokenizer, folder)
        _empty()
        trainer.recorder = recorder = Recorder()
        trainer.train()
        recorder.end("rest")
    peak, seconds = max(recorder.peaks.values()), sum(recorder.seconds.values())
    tokens = shape.batch * (shape.prompt + shape.reply)
    out.tell("update", {"peak_bytes": peak, "of_16_gib": peak / AIM, "reserved_bytes": recorder.memory.reserved,
                        "before_bytes": recorder.before, "seconds": seconds})  # fmt: skip
    for phase in ("sampling", "scoring", "optimisation", "rest"):
        out.tell(phase, {"peak_bytes": recorder.peaks[phase], "seconds": recorder.seconds[phase]})
    # Sampling is a pass over each token. Scoring: policy, reference, reward and value. Optimisation, in each epoch: of
    # policy and value a pass, the same again where activations are recomputed, and one backwards to what is trained.
    passes = {"sampling": 1, "scoring": 4, "optimisation": 2 * 3 * work.epochs}
    for phase, times in passes.items():
        counted = shape.batch * shape.reply if phase == "sampling" else tokens
        rate = counted * (work.epochs if phase == "optimisation" else 1) / recorder.seconds[phase]
        share = _share(2 * parameters * tokens * times, recorder.seconds[phase], shape)
        out.tell(f"{phase} rate", {"tokens_per_second": rate} | share)


def sft(out: Out, shape: Shape) -> None:
    """Steps of SFT."""
    from trl import SFTConfig

    from rlhf_pipeline.stages.sft import ResumableSFTTrainer

    length = shape.prompt + shape.reply
    ids = _ids(shape.batch, length)
    labels = [[-100] * shape.prompt + row[shape.prompt :] for row in ids]
    _steps(out, shape, ResumableSFTTrainer, SFTConfig, {"input_ids": ids, "labels": labels}, shape.batch * length, 3)


def dpo(out: Out, shape: Shape) -> None:
    """Steps of DPO: each pair is two rows, which policy and reference both read."""
    from trl import DPOConfig

    from rlhf_pipeline.stages.dpo import EncodedDPOTrainer

    ids = _ids(3 * shape.batch, max(shape.prompt, shape.reply))
    rows = {
        "prompt_ids": [row[: shape.prompt] for row in ids[: shape.batch]],
        "chosen_ids": [row[: shape.reply] for row in ids[shape.batch : 2 * shape.batch]],
        "rejected_ids": [row[: shape.reply] for row in ids[2 * shape.batch :]],
    }
    tokens = 2 * shape.batch * (shape.prompt + shape.reply)
    _steps(out, shape, EncodedDPOTrainer, DPOConfig, rows, tokens, 4)


def _steps(
    out: Out, shape: Shape, trainer_class: Any, config_class: Any, rows: dict[str, Any], tokens: int, passes: int
) -> None:
    """Three steps of a trainer on the same rows; the first, which sets up what stays, counts for the peak alone.

    Args:
        passes: how often a token goes through the model: forwards, again where activations are recomputed, backwards,
            and for a reference.
    """
    from datasets import Dataset
    from memory import LORA
    from ppo_memory import Recorder
    from transformers import TrainerCallback

    from rlhf_pipeline.models import adapters

    base, tokenizer, _, parameters = _random(out, shape)
    model = adapters.with_policy_adapter(base, LORA, None)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise()
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise()
            seconds.append(time.perf_counter() - self.since)

    with tempfile.TemporaryDirectory(prefix="gpu-steps-") as folder:
        args = config_class(
            output_dir=folder, max_steps=3, per_device_train_batch_size=shape.batch, max_length=None, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=not _has_gpu(),
            bf16=shape.dtype == "bfloat16", gradient_checkpointing=True,
        )  # fmt: skip
        trainer = trainer_class.over(model, args, tokenizer, Dataset.from_dict(rows), None, [Clock()])
        _empty()
        recorder = Recorder()
        trainer.train()
        recorder.end("rest")
    peak, best = recorder.peaks["rest"], min(seconds[1:])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    out.tell(
        "memory", {"peak_bytes": peak, "before_bytes": recorder.before, "reserved_bytes": recorder.memory.reserved}
    )
    share = _share(2 * parameters * tokens * passes, best, shape)
    out.tell("step", {"seconds": best, "first_seconds": seconds[0], "tokens_per_second": tokens / best} | share)
    out.tell("losses", {f"step_{number}": loss for number, loss in enumerate(losses, 1)})


def resume(out: Out, shape: Shape) -> None:
    """SFT and PPO on the tiny checkpoint in NF4, resumed, and whole."""
    import gpu_checks

    with tempfile.TemporaryDirectory(prefix="gpu-resume-") as folder:
        gpu_checks.resumed_as_if_never_stopped(Path(folder), out.tell)


def tiny(out: Out, shape: Shape) -> None:
    """The tiny recipe in NF4 by the command, as a user runs it, and what its judge says."""
    overrides = ["model.quantization=nf4", "model.dtype=auto"]
    if shape is SHAPES["small"]:
        overrides += ["sft.trainer.max_steps=4", "reward.trainer.max_steps=4", "dpo.trainer.max_steps=4"]
        overrides += ["ppo.trainer.total_episodes=64", "evaluate.n=8", "evaluate.along=0"]
    with tempfile.TemporaryDirectory(prefix="gpu-tiny-") as folder:
        command = [sys.executable, "-m", "rlhf_pipeline", "run", "tiny", *overrides, f"output_dir={folder}"]
        started, told = time.perf_counter(), set()
        process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)
        while True:
            over = process.poll() is not None
            for name in ("sft", "reward", "ppo", "dpo"):
                file = Path(folder) / "tiny" / name / "stage.json"  # replaced in one step
                record = json.loads(file.read_text()) if file.is_file() else {}
                if record.get("state") == "done" and name not in told:
                    told.add(name)
                    metrics = record.get("metrics") or {}
                    kept = ("judge_mean", "judge_mean_se", "generation_gap", "loss", "eval_accuracy", "objective/kl")
                    numbers = {key: metrics[key] for key in kept if key in metrics}
                    out.tell(name, {"seconds": record.get("wall_s")} | numbers)
            if over:
                break
            time.sleep(0.5)
        out.tell("run", {"exit_code": process.returncode, "seconds": time.perf_counter() - started})
    if process.returncode:
        raise SystemExit(process.returncode)


def forecast(out: Out, shape: Shape) -> None:
    """What `rlhf-pipeline forecast` says of the three phases above, beside what was measured; it needs no GPU."""
    try:
        from rlhf_pipeline.forecast import work
        from rlhf_pipeline.forecast.cards import ANY
    except ImportError:
        out.tell("forecast", {"not here": "this version has no `forecast`"})
        return
    from memory import LORA, TOKENIZER, llama_config
    from transformers import AutoTokenizer

    from rlhf_pipeline.recipe.schema import Recipe

    peaks = {line["phase"]: line["numbers"] for line in lines(out.file) if line["name"] in PEAKS}
    # What a GPU's allocator counts; of a CPU there is the whole process, with its libraries.
    measured = {phase: numbers["peak_bytes"] for phase, numbers in peaks.items() if numbers["reserved_bytes"]}
    common = {"per_device_train_batch_size": shape.batch, "gradient_checkpointing": True}
    of_ppo = {"total_episodes": shape.batch, "response_length": shape.reply, "num_sample_generations": 0}
    with tempfile.TemporaryDirectory(prefix="gpu-forecast-") as folder:
        llama_config(shape.model, shape.dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        text = {"data": {"path": "rows.jsonl"}, "trainer": common | {"max_length": None}, "init": "base", "lora": LORA}
        reward = text | {"kind": "reward"}
        ppo_stage = text | {"kind": "ppo", "trainer": common | of_ppo, "reward": "reward"}
        for name, stages in {
            "sft": {"sft": text | {"kind": "sft"}},
            "dpo": {"dpo": text | {"kind": "dpo"}},
            "ppo": {"reward": reward, "ppo": ppo_stage},
        }.items():
            recipe = Recipe.model_validate(
                {"name": "gpu", "output_dir": folder, "lora": LORA, "stages": stages,
                 "model": {"path": folder, "quantization": shape.quantization, "dtype": shape.dtype}}
            )  # fmt: skip
            rows = dict.fromkeys(stages, (shape.prompt, shape.prompt + shape.reply))
            stage = work.forecast(recipe, ANY, advise=False, rows=rows).stages[-1]
            known = measured.get(name)
            beside = {"measured_bytes": known, "forecast_of_measured": stage.allocated / known} if known else {}
            out.tell(name, {"forecast_bytes": stage.allocated} | beside)


# In the order of what they are worth, with the seconds that each may take.
PHASES: dict[str, tuple[Callable[[Out, Shape], None], int]] = {
    "machine": (machine, 60),
    "checks": (checks, 120),
    "ppo": (ppo, 180),
    "sft": (sft, 75),
    "dpo": (dpo, 75),
    "resume": (resume, 120),
    "tiny": (tiny, 180),
    "forecast": (forecast, 120),
}


# What the phases of the random model share


def _random(out: Out, shape: Shape) -> tuple[Any, Any, Any, int]:
    """The random base, its tokenizer and configuration, and how many weights each token is multiplied with."""
    from memory import TOKENIZER, llama_config, random_base
    from transformers import set_seed

    from rlhf_pipeline.models.tokenizer import load_tokenizer
    from rlhf_pipeline.recipe.schema import Model

    set_seed(0)
    started, tokenizer = time.perf_counter(), load_tokenizer(str(TOKENIZER))
    config = llama_config(shape.model, shape.dtype)
    spec = Model(path=str(TOKENIZER), quantization=shape.quantization, dtype=shape.dtype)
    base = random_base(config, spec, tokenizer)
    synchronise()
    every = sum(
        layer.in_features * layer.out_features
        for name, layer in base.named_modules()
        if hasattr(layer, "in_features") and name != "lm_head"
    )
    head = config.vocab_size * config.hidden_size
    out.tell("model", {"parameters": every + 2 * head, "made_in_seconds": time.perf_counter() - started})
    return base, tokenizer, config, every


def ppo_shape(shape: Shape) -> Any:
    from ppo_memory import Shape as Work

    return Work(
        shape.model, shape.quantization, shape.dtype, batch=shape.batch, prompt_length=shape.prompt,
        response_length=shape.reply, epochs=4, gradient_checkpointing=True,
    )  # fmt: skip


def _less(work: Any) -> Any:
    return replace(work, batch=2, prompt_length=4, response_length=3, epochs=1)


def _ids(rows: int, length: int) -> list[list[int]]:
    import torch
    from memory import VOCABULARY_SIZE

    draw = torch.Generator().manual_seed(0)
    return torch.randint(5, VOCABULARY_SIZE, (rows, length), generator=draw).tolist()


def _share(operations: float, seconds: float, shape: Shape) -> dict[str, float]:
    """The rate of products with the base's weights, attention and head apart, as a share of what the card can do."""
    rates = matrix_rate(8192 if shape is SHAPES["8b"] else 256)
    found = {"tflops": operations / seconds / 1e12}
    shares = {f"of_{name.removesuffix('_tflops')}": found["tflops"] / rate for name, rate in rates.items()}
    return found | shares


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _empty() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# The process that starts the phases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for results.jsonl and results.md")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the random models")
    parser.add_argument("--only", help="some phases, with commas between them, added to what `--out` has")
    parser.add_argument("--seconds", type=int, default=ALL_SECONDS, help=f"for all phases together ({ALL_SECONDS})")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        return in_this_process(options.phase, options.out, SHAPES[options.shape])
    chosen = options.only.split(",") if options.only else list(PHASES)
    if unknown := set(chosen) - PHASES.keys():
        parser.error(f"no such phase: {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if problem := lacking():
        print(problem, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.only:  # else they are added to what is there
        (options.out / RESULTS).write_text("")
    until = time.monotonic() + options.seconds
    went = [start(name, options.out, options.shape, until) for name in PHASES if name in chosen]
    return int(not all(went))


def lacking() -> str | None:
    """What this Python lacks, in one line."""
    import importlib.util

    names = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed here: {', '.join(names)}" if names else None


def start(name: str, folder: Path, shape: str, until: float) -> bool:
    """Run a phase in a process group of its own; returns whether it went through."""
    limit = min(PHASES[name][1], until - time.monotonic())
    print(f"{name} ({max(limit, 0):.0f} s at most)", flush=True)
    started = time.monotonic()
    if limit < 5:
        return _end(folder, name, "left out: the time is over", 0.0)
    command = [sys.executable, __file__, "--phase", name, "--out", str(folder), "--shape", shape]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}  # trainers would take all
    environment = os.environ | ENVIRONMENT | one_gpu | {"PYTHONPATH": os.pathsep.join(paths)}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
            state = "done" if code == 0 else f"failed with {code}: see {name}.log"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it, and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _end(folder, name, state, time.monotonic() - started)


def _end(folder: Path, name: str, state: str, seconds: float) -> bool:
    """Note how a phase ended, and write the tables of what is known by now."""
    Out(folder, name).tell(PHASE, {"state": state, "seconds": seconds})
    (folder / TABLE).write_text(as_tables(lines(folder / RESULTS)), encoding="utf-8")
    return state == "done"


def in_this_process(name: str, folder: Path, shape: Shape) -> int:
    """Go through a phase; figures go to standard output, and whatever libraries print to the log."""
    out = Out(folder, name, os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    try:
        PHASES[name][0](out, shape)
    except Exception as error:
        out.tell("failed", {"said": f"{type(error).__name__}: {error}"[:500]})
        raise
    return 0


def lines(file: Path) -> list[dict[str, Any]]:
    """What was written by now; a line that was cut off is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def as_tables(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown, a table for each phase; bytes in GiB."""
    parts = []
    for phase in dict.fromkeys(line["phase"] for line in found):
        own = [line for line in found if line["phase"] == phase]
        rows = [f"| {line['name']} | {'; '.join(map(_cell, line['numbers'].items()))} |" for line in own]
        parts.append("\n".join([f"## {phase}", "", "| what | figures |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _cell(item: tuple[str, Any]) -> str:
    key, value = item
    if key.endswith("_bytes") and isinstance(value, int):
        key, value = f"{key.removesuffix('_bytes')} GiB", value / 2**30
    return f"{key.replace('_', ' ')} {_shown(value)}".replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
