"""What the benchmark for a GPU asks of CUDA and of vLLM, on a CPU that looks like a GPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.gpu_benchmark import Clock, comparison, loaded


@pytest.fixture
def bench(monkeypatch):
    with loaded(monkeypatch) as modules:
        yield modules


class FakeCuda:
    """A log of calls to `torch.cuda`, and a clock that is read where an event is recorded."""

    def __init__(self, monkeypatch):
        self.log, self.clock, self.allocated, self.peak = [], Clock(), 1000, 0
        log, clock = self.log, self.clock

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")
                self.at = clock()

            def elapsed_time(self, end):
                assert log[-1] == "synchronize", "the end was read before it was there"
                return 1e3 * (end.at - self.at)

        def counted(name, value=None):
            def call():
                log.append(name)
                return value() if value else None

            return call

        monkeypatch.setattr(torch.cuda, "Event", Event)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, counted(name))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", counted("reset", self._reset))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)

    def _reset(self):
        self.peak = self.allocated

    def allocate(self, size):
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


def test_cuda_is_measured_with_events_after_a_warm_up(bench, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    first = iter([True])

    def run():
        cuda.log.append("run")
        # The first run compiles and tunes, which takes time and memory.
        extra = 100 if next(first, False) else 1
        cuda.clock.now += extra
        cuda.allocate(64 * extra)
        cuda.allocate(-64 * extra)

    case = bench.timing.Case(run, lambda: cuda.log.append("before"), lambda: cuda.log.append("after"))
    rows = bench.gpu_rows.measure(
        comparison(bench, {"a": lambda: case}), "cuda", 2, bench.gpu_rows.Budget(1e9, cuda.clock)
    )
    assert (rows[0].peak_bytes, rows[0].seconds) == (64, [1.0, 1.0])
    warm_up, peak = ["before", "run", "after"], ["before", "synchronize", "reset", "run", "synchronize", "after"]
    sample = ["before", "synchronize", "record", "run", "record", "synchronize", "after"]
    assert cuda.log == warm_up + peak + 4 * sample


def test_the_second_step_of_a_new_trainer_is_measured_and_nothing_around_it(bench, monkeypatch):
    cuda, built = FakeCuda(monkeypatch), []

    def trainer(setup, way, method, clock):
        def train():
            for seconds in (9.0, 2.0 + len(built)):
                cuda.clock.now += 50.0
                clock.on_step_begin(None, None, None)
                cuda.clock.now += seconds
                clock.on_step_end(None, None, None)

        built.append((way, method))
        return SimpleNamespace(train=train)

    monkeypatch.setattr(bench.gpu_grpo, "_trainer", trainer)
    setup = SimpleNamespace(device="cuda", scale=bench.gpu.QUICK)
    lora, _ = bench.gpu_grpo.grpo(setup)
    budget = bench.gpu_rows.Budget(1e9, cuda.clock)
    lora.cases = {"TRL": lora.cases["TRL"]}
    (row,) = bench.gpu_rows.measure(lora, "cuda", 1, budget)
    # One for the peak, without a run before it, and two for the round.
    assert built == 3 * [("TRL", "LoRA")] and row.seconds == [(4.0 + 5.0) / 2]


class CudaOnCpu(TorchFunctionMode):
    """Tensors that are asked for on CUDA are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*map(self._there, args), **{k: self._there(v) for k, v in (kwargs or {}).items()})

    def _there(self, value):
        on_cuda = (
            value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"
        )
        return "cpu" if on_cuda else value


@pytest.fixture
def on_cuda(bench, monkeypatch, tmp_path):
    """A set-up for CUDA with tiny sizes, on a CPU that looks like it."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    with CudaOnCpu():
        yield bench.gpu.Setup("cuda", bench.gpu.QUICK, tmp_path), cuda


@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_train_step_for_cuda_is_in_bfloat16(bench, on_cuda):
    setup, _ = on_cuda
    assert {p.dtype for p in setup.base.parameters()} == {torch.bfloat16} and setup.dtype == torch.bfloat16
    layer, model = bench.gpu_sections.adapters(setup)
    for case in (layer.cases["LoRA"](), model.cases["PMSS"]()):
        case.before()
        case.run()
        case.after()
    one, two = setup.adapted("LoRA"), setup.adapted("Bone")
    shared = {p.data_ptr() for p in setup.base.parameters()}
    for adapted in (one, two):
        frozen = {p.data_ptr() for p in adapted.parameters() if not p.requires_grad}
        assert frozen <= shared and any(p.requires_grad for p in adapted.parameters())
    assert setup.described()["dtype"] == "bfloat16"


def test_adapters_are_where_the_base_is(bench, tmp_path):
    """Nothing else is on the meta device by accident."""
    setup = bench.gpu.Setup("meta", bench.gpu.QUICK, tmp_path)
    for method in bench.gpu_setup.ADAPTERS:
        model = setup.adapted(method)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}, method


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_all_sections_take_the_path_for_cuda(bench, on_cuda, monkeypatch):
    """Every section with some of its rows, bfloat16 and all, where only the device itself is missing."""
    setup, cuda = on_cuda
    monkeypatch.setattr(bench.gpu_sections, "ADAPTERS", ("LoRA", "fast DoRA", "bat_col", "PMSS"))
    rows = bench.gpu.run(setup, list(bench.gpu.SECTIONS), 1, bench.gpu_rows.Budget(1e9))
    assert {(row.case, row.status) for row in rows if row.status != "measured"} <= {("vLLM, merged model", "skipped")}
    assert {row.section for row in rows} == set(bench.gpu.SECTIONS)
    assert cuda.log.count("reset") == sum(row.status == "measured" for row in rows)


# -- vLLM --------------------------------------------------------------------------------------------------------------
def test_vllm_generates_from_the_weights_of_the_model(bench, on_cuda, monkeypatch):
    """An engine in the place of vLLM, which loads what it is given; without one, and on a CPU, the row says why not."""
    from transformers import AutoModelForCausalLM

    setup, _ = on_cuda
    seen = {}

    class LLM:
        def __init__(self, model, **options):
            seen.update(model=AutoModelForCausalLM.from_pretrained(model), **options)

        def generate(self, prompts, params, use_tqdm):
            seen.update(prompts=[prompt["prompt_token_ids"] for prompt in prompts], params=params)

    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = LLM, lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    case = bench.gpu_sections.vllm_generation(setup)
    case.run()
    ours, theirs = setup.base.state_dict(), seen["model"].state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    sequences, prompt, new = setup.scale.rollout
    assert [len(ids) for ids in seen["prompts"]] == [prompt] * sequences
    assert (seen["params"]["max_tokens"], seen["params"]["ignore_eos"]) == (new, True)
    assert seen["max_model_len"] >= prompt + new and seen["dtype"] == "bfloat16"
    with pytest.raises(bench.gpu_rows.Skipped, match="on a GPU only"):
        bench.gpu_sections.vllm_generation(bench.gpu.Setup("cpu", bench.gpu.QUICK, setup.folder))
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(bench.gpu_rows.Skipped, match="not installed"):
        bench.gpu_sections.vllm_generation(setup)
