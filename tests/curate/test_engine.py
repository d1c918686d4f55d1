"""Resuming: finished work is kept unless its settings changed."""

import pytest

from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Engine, Run, Runner, Stage
from bc2_jax.curate.storage import Folder

ENGINE = Engine("native")


class Step(Stage):
    """A stage of given functions."""

    def __init__(self, name, settings, work, clear=lambda: None, intact=lambda _: True):
        self.name, self._settings, self._work, self._clear, self._intact = name, settings, work, clear, intact

    def settings(self, config):
        return self._settings

    def run(self, runner):
        return self._work(runner)

    def clear(self, run):
        self._clear()

    def is_intact(self, runner, result):
        return self._intact(result)


def runner_in(folder, key="k") -> Runner:
    run = Run(Folder(folder), Folder(folder), CurationConfig())
    return Runner(run, ENGINE, key, lambda *_: None)


def run_two(folder, key, first, second, calls):
    runner = runner_in(folder, key)
    for name, settings in (("one", first), ("two", second)):
        runner.execute(Step(name, settings, lambda _, name=name: calls.append(name) or {"of": name}))
    assert runner.results == {"one": {"of": "one"}, "two": {"of": "two"}}
    return runner


@pytest.mark.parametrize(
    "again, redone",
    [(("k", 1, 2), []), (("k", 1, 3), ["two"]), (("k", 0, 2), ["one", "two"]), (("other", 1, 2), ["one", "two"])],
)
def test_a_stage_is_redone_if_it_or_one_before_it_changed(tmp_path, again, redone):
    calls: list[str] = []
    run_two(tmp_path, "k", 1, 2, calls)
    assert calls == ["one", "two"]
    calls.clear()
    runner = run_two(tmp_path, *again, calls)
    assert calls == redone
    assert set(runner.seconds) == {"one", "two"}


def test_finished_shards_of_an_interrupted_stage_are_kept(tmp_path):
    counter = Folder(tmp_path / "calls")

    def make(fails):
        def work(run, name):
            if name == fails:
                raise RuntimeError("lost host")
            counter.write(f"{name}-{fails}", b"")
            return {"square": int(name) ** 2}

        return work

    names = [f"{i:02d}" for i in range(6)]

    def attempt(fails):
        return runner_in(tmp_path / "work").execute(Step("s", 0, lambda runner: runner.map(make(fails), names)))

    with pytest.raises(Exception, match="lost host"):
        attempt("05")
    finished = [name.split("-")[0] for name in counter.names() if name.endswith("-05")]
    assert attempt("none") == [{"square": i**2} for i in range(6)]
    again = [name.split("-")[0] for name in counter.names() if name.endswith("-none")]
    assert finished and sorted(finished + again) == [f"{i:02d}" for i in range(6)]


def test_a_marker_goes_before_what_it_stands_for(tmp_path):
    """A run stopped while it removes an old result starts the stage again, with either settings."""

    def attempt(settings, clear):
        def work(runner):
            Folder(tmp_path / "out").write("result", settings.encode())
            return {"settings": settings}

        return runner_in(tmp_path / "work").execute(Step("s", settings, work, clear))

    def stop():
        assert not (tmp_path / "work" / "s").exists()
        Folder(tmp_path / "out").remove()
        raise KeyboardInterrupt

    cleared: list[str] = []
    for settings in ("b", "a"):
        attempt("a", lambda: None)
        with pytest.raises(KeyboardInterrupt):
            attempt("b", stop)
        assert attempt(settings, lambda: cleared.append("yes")) == {"settings": settings}
        assert (tmp_path / "out" / "result").read_text() == settings
    assert cleared == ["yes", "yes"]


def test_what_is_not_intact_or_cut_is_done_again(tmp_path):
    def attempt(intact):
        calls = Folder(tmp_path / "calls")

        def make(run, name):
            calls.write(f"{name}{len(calls.names())}", b"")
            return {"name": name}

        before = len(calls.names())
        work = Step("s", 0, lambda runner: runner.map(make, ["a", "b"], is_intact=intact), intact=lambda _: False)
        runner_in(tmp_path).execute(work)
        return sorted(name[0] for name in calls.names() if int(name[1:]) >= before)

    assert attempt(lambda *_: True) == ["a", "b"]
    assert attempt(lambda *_: True) == []
    assert attempt(lambda run, name, result: name == result["name"] == "b") == ["a"]
    (tmp_path / "s" / "results" / "b.json").write_bytes(b"")
    assert attempt(lambda *_: True) == ["b"]


def test_an_engine_that_gives_up_is_an_error(monkeypatch):
    import daft

    monkeypatch.setattr(daft.DataFrame, "iter_rows", lambda self: iter([{"index": 0, "result": "{}"}]))
    with pytest.raises(RuntimeError, match="1 of 2 tasks were given up by the engine"):
        list(ENGINE.map(lambda task: {}, [{}, {}]))


def test_a_changed_stage_does_not_see_old_files(tmp_path):
    def attempt(settings):
        def work(runner):
            before = runner.folder.names(".txt")
            runner.folder.write(f"{settings}.txt", b"x")
            return before

        return runner_in(tmp_path).execute(Step("s", settings, work))

    assert attempt("a") == [] and attempt("b") == []


def test_runner_names():
    with pytest.raises(ValueError, match="--runner = 'spark' is not valid: legal values are native, ray"):
        Engine("spark")
