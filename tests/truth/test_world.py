"""Folders vanish, disks fill up, servers are silent: one clear line, and nothing saved is lost."""

import resource
import socket
import threading
import time

import pytest

from qtrain.common.network import answers


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_the_folder_of_a_run_is_deleted(job, tmp_path, logger):
    outcome = job(
        "vandal.Vandal",
        f"logger={logger}",
        what="delete",
        path=str(tmp_path / "run0"),
    )
    assert (
        outcome.code == 1
        and f"qtrain: error: {tmp_path}/run0: this folder was deleted while"
        in outcome.text
    )
    assert "Traceback" not in outcome.text


def test_the_float_cache_is_deleted(job, tmp_path):
    cache = tmp_path / "cache"
    outcome = job(
        "vandal.Vandal", f"float_cache={cache}", what="delete", path=str(cache)
    )
    assert (
        outcome.code == 1 and f"qtrain: error: float_cache={cache}: " in outcome.text
    )
    assert "Traceback" not in outcome.text


def test_a_file_of_the_data_is_deleted(job, tmp_path):
    outcome = job("vandal.Vandal", what="read", path=str(tmp_path / "data" / "7.png"))
    assert (
        outcome.code == 1
        and f"qtrain: error: {tmp_path}/data/7.png: there is no such file"
        in outcome.text
    )
    assert "hydra.run.dir" not in outcome.text and "Traceback" not in outcome.text


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_a_full_disk_costs_nothing_that_was_saved(
    job, command, tmp_path, monkeypatch, logger
):
    """No file can grow beyond 64 bytes, as on a full disk, until there is room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full = job(
            "vandal.Vandal",
            f"logger={logger}",
            "trainer.save_every=2",
            what="fill",
            path=str(tmp_path),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        full.code == 1
        and f"qtrain: error: {full.run_dir}" in full.text
        and "Traceback" not in full.text
    )
    assert (
        "files already there are unchanged" in full.text
        and (full.run_dir / "resume" / "float.pt").is_file()
    )
    monkeypatch.setenv("QTRAIN_TRUST", "vandal")
    code, text = command(f"resume={full.run_dir}")
    assert code == 0, text
    assert full.loss("float") == job(
        "vandal.Vandal", what="fill", path=str(tmp_path)
    ).loss("float")


@pytest.fixture
def silent():
    """A server that takes connections and says nothing: its address, and its connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def take():
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:  # closed
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        server.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()


def test_a_download_from_a_silent_server_ends_soon(job, tmp_path, silent):
    url, taken = silent
    began = time.monotonic()
    outcome = job("downloads.Downloads", url=f"{url}/w.pt", folder=str(tmp_path))
    assert (
        outcome.code == 1
        and "qtrain: error: model: " in outcome.text
        and "go online" in outcome.text
    )
    assert time.monotonic() - began < 30 and len(taken) == 1


def test_a_silent_hub_is_asked_once(silent):
    url, taken = silent
    began = time.monotonic()
    assert [answers(url), answers(url)] == [False, False]
    assert time.monotonic() - began < 7 and len(taken) == 1


def test_more_processes_than_cores_can_serve_are_refused_before_any_starts(
    job, monkeypatch
):
    """64 processes, each importing torch, once filled the memory of a machine of 2 cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run = job("mlp", "trainer.devices=64")
    assert run.code == 1
    said = "trainer.devices=64: device=cpu is 4; allowed are 2 for each of 2 cores"
    assert said in run.text


def test_processes_of_torchrun_may_be_on_several_machines(monkeypatch):
    from qtrain.runs import launch

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(ValueError, match="device=cpu is 4"):
        launch._check_devices(8, "cpu")
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    launch._check_devices(8, "cpu")
