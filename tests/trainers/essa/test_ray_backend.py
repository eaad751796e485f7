"""Real local Ray nodes: a cluster for this file, whose workers are killed, put to sleep and lost with their node.

What happens in a worker is done by its reward function, which is local and so travels by value. Workers and tests
speak through files.
"""

import logging
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from transformers import TrainerCallback

from trainers.essa import ESSAConfig, ESSATrainer
from trainers.rewards.calling import RewardError


STORE = 80 * 2**20  # bytes of a node's object store, near Ray's least
PATIENCE = 200  # seconds for what takes some on an idle machine: a worker imports torch, transformers and peft


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a CPU each, the driver connected to the first."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # a dead node, which refuses connections, is noticed within 2 seconds instead of 15; a slow one is waited for
    health = {"health_check_period_ms": 500, "health_check_timeout_ms": 20000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "object_store_memory": STORE, "_system_config": health}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.second = found.add_node(num_cpus=1, object_store_memory=STORE)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def share_of_capitals(event=None):
    """A reward function; `event(generation)` is called first, in the worker."""

    def reward(completions, trainer_state, **columns):
        if event is not None:
            event(trainer_state.global_step)
        return [sum("A" <= letter <= "Z" for letter in text) / 6 for text in completions]

    return reward


@pytest.fixture
def make(lora, letters, prompts, tmp_path):
    """`make(event, **options)`: a trainer with Ray workers on a tiny model, 4 parts of 8 rows in a generation."""

    def build(event=None, callbacks=None, eval_data=None, **options):
        settings = {
            "output_dir": str(tmp_path / "run"), "population_size": 8, "batch_size_per_candidate": 4, "sigma": 0.2,
            "max_concurrent_sequences": 8, "max_completion_length": 6, "max_steps": 3, "temperature": 1.0,
            "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "candidate_backend": "ray",
        }  # fmt: skip
        return ESSATrainer(
            model=lora(),
            reward_funcs=share_of_capitals(event),
            args=ESSAConfig(**settings | options),
            train_dataset=prompts(12),
            eval_dataset=eval_data,
            processing_class=letters,
            callbacks=callbacks,
        )

    return build


@pytest.fixture
def alone(make):
    """`alone(**options)`: the same run in this process, finished."""

    def run(**options):
        trainer = make(candidate_backend="batched", **options)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def together(tmp_path):
    """`together(generation, name)`, to be called in a worker: returns once two names have called in a generation."""
    folder, patience = tmp_path, PATIENCE

    def meet(generation, name):
        (folder / f"{generation}-{name}").touch()
        deadline = time.monotonic() + patience
        while len(list(folder.glob(f"{generation}-*"))) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody came beside {name} in generation {generation}")
            time.sleep(0.02)

    return meet


def assert_equal(trainer, other):
    """The search is in the same state bit for bit, and logged the same."""
    (facts, arrays), (other_facts, other_arrays) = trainer.strategy.state_dict(), other.strategy.state_dict()
    assert facts == other_facts and arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, other_arrays[name]), name
    assert figures(trainer) == figures(other)


def figures(trainer):
    """What was logged of generations and evaluations, without times."""
    times = ("seconds", "runtime", "per_second")
    entries = [entry for entry in trainer.state.log_history if "reward" in entry or "eval_reward" in entry]
    return [{key: value for key, value in entry.items() if not key.endswith(times)} for entry in entries]


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids(folder, generation):
    return {int(file.name.split("-")[1]) for file in folder.glob(f"{generation}-*")}


def test_workers_compute_what_this_process_does_and_end_with_their_run(
    cluster, make, alone, together, prompts, tmp_path
):
    options = {"eval_data": prompts(20, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    # the third waits for a CPU that there is not, and holds up nobody
    trainer = make(lambda generation: together(generation, os.getpid()), num_workers=3, **options)
    trainer.train()
    assert_equal(trainer, alone(**options))
    workers = pids(tmp_path, 0)
    assert len(workers) == 2 and os.getpid() not in workers
    wait_for(lambda: not any(map(is_alive, workers)))


def test_a_worker_that_is_killed_in_mid_generation_loses_nothing(cluster, make, alone, tmp_path, caplog):
    def die_once(generation):
        if generation == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = make(die_once)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert (tmp_path / "died").exists() and "A Ray worker was lost" in caplog.text
    assert_equal(trainer, alone())


def test_a_node_may_leave_in_mid_generation_and_another_join(cluster, make, alone, together, tmp_path):
    node = cluster.second
    doomed = node.node_id  # what a worker's function speaks of travels with it

    def sleep_there(generation):
        import ray

        here = ray.get_runtime_context().get_node_id()
        together(generation, here)
        if generation == 1 and here == doomed:
            time.sleep(PATIENCE)

    def remove():
        wait_for(lambda: (tmp_path / f"1-{doomed}").exists())
        cluster.remove_node(node, allow_graceful=False)

    class Join(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                cluster.second = cluster.add_node(num_cpus=1, object_store_memory=STORE)

    remover = threading.Thread(target=remove)
    remover.start()
    trainer = make(sleep_there, callbacks=[Join()])
    trainer.train()
    remover.join()
    assert (tmp_path / f"2-{cluster.second.node_id}").exists() and cluster.second.node_id != doomed
    assert_equal(trainer, alone())


def test_a_straggler_is_overtaken_and_replaced_if_it_never_ends(cluster, make, alone, together, tmp_path):
    def sleep_once(generation):
        if generation in (0, 4):
            together(generation, os.getpid())
        if generation == 1 and not (tmp_path / "asleep").exists():
            (tmp_path / "asleep").write_text(str(os.getpid()))
            time.sleep(PATIENCE)
            (tmp_path / "awake").touch()

    trainer = make(sleep_once, max_steps=5)
    trainer.train()
    assert not (tmp_path / "awake").exists()
    assert int((tmp_path / "asleep").read_text()) in pids(tmp_path, 0) - pids(tmp_path, 4)
    assert_equal(trainer, alone(max_steps=5))


def test_an_error_of_a_reward_function_arrives_as_itself_and_the_search_is_as_before(cluster, make, alone):
    def break_later(generation):
        if generation == 1:
            raise KeyError("answer")

    trainer = make(break_later, num_workers=1)
    with pytest.raises(RewardError, match="`reward` raised KeyError: 'answer'") as raised:
        trainer.train()
    assert raised.value.function == "reward" and "break_later" in str(raised.value.__cause__)
    assert_equal(trainer, alone(max_steps=1))


def test_workers_that_die_again_and_again_end_the_run_with_the_last_state(cluster, make, alone, monkeypatch):
    monkeypatch.setattr("trainers.essa.ray_backend.MOST_LOSSES", 2)  # each costs the start of a worker

    def die(generation):
        if generation == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = make(die, num_workers=1)
    with pytest.raises(RuntimeError, match="2 Ray workers were lost over rows 0 to 7 in generation 1"):
        trainer.train()
    assert_equal(trainer, alone(max_steps=1))


def test_without_ray_the_error_names_the_extra(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"hf_ext\[ray\]"):
        make()
