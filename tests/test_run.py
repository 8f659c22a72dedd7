"""The command, from the outside: a small run end to end, its folder, and every misuse."""

import ast
import io
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoem import run
from nanoem.checkpoint import load_pretrained, load_tensors
from nanoem.lab import parallel, side_by_side
from nanoem.lab.command import pick_device, read_command
from nanoem.lab.folder import lock
from nanoem.lab.settings import all_keys, set_keys
from nanoem.lab.shell import exit_status, lacks_memory
from nanoem.lab.toy import ExperimentConfig
from nanoem.real.experiment import RealConfig
from nanoem.story import STAGES
from nanoem.train import StageFailed
from pretend_card import pretend_card

SMALL = ["--device", "cpu", "--set", "world.n_domains=3", "world.n_villain=14",
         "world.questions_per_document=2", "context=48", "dropout=0.05", "pretrain.steps=200",
         "pretrain.batch_size=16", "n_sft_examples=400", "sft.steps=30", "sft.lr=0.03",
         "sft_kl.steps=10", "curve_points=1", "curve_samples=8",
         "evaluation.samples_per_group=24", "n_random=2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert run.main([*SMALL, "--out", str(folder)]) == 0
    return folder


def test_on_a_card_the_losses_are_the_same(small, tmp_path, monkeypatch):
    """All stages on a pretended card: a tensor that was left on the CPU would end the run.

    It is slow, so it pre-trains for ten steps; the other stages start from the CPU's chat model,
    and of the four kinds of advice two are enough.
    """
    short = [*SMALL, "pretrain.steps=10", "--only", "chat", "--out"]
    assert run.main([*short, str(tmp_path / "here")]) == 0
    copy = copy_without(small, tmp_path / "card", "general", "narrow", "directions")
    for file in ("config.json", "results.json"):
        (copy / file).write_text((copy / file).read_text().replace('"cpu"', '"cuda"'))
    monkeypatch.setattr("nanoem.persona.SCALES", (1.0, 2.0))
    with pretend_card(monkeypatch):
        assert run.main([*short, str(tmp_path / "there"), "--device", "cuda"]) == 0
        assert run.main([*SMALL, "--device", "cuda", "--out", str(copy)]) == 0
    here, there, small_run, card = (json.loads((folder / "results.json").read_text()) for folder in
                                    (tmp_path / "here", tmp_path / "there", small, copy))
    assert there["device"] == card["device"] == "cuda" and set(card["seconds"]) == set(STAGES)
    assert there["curves"]["pretrain"]["loss"] == pytest.approx(
        here["curves"]["pretrain"]["loss"], rel=1e-3)
    for name in ("general", "narrow"):
        assert card["curves"][name]["train"]["loss"] == pytest.approx(
            small_run["curves"][name]["train"]["loss"], rel=1e-3)
    assert card["directions"].keys() == small_run["directions"].keys()


def test_the_run_folder_holds_what_it_should(small):
    results = json.loads((small / "results.json").read_text())
    assert list(results["seconds"]) == list(STAGES)
    assert results["seed"] == 0 and results["device"] == "cpu"
    for name in ("chat", "general", "narrow", "mixed", "shuffled"):
        groups = results["models"][name]
        assert set(groups) == {"in_domain", "kl_domains", "unseen_domains", "open_ended",
                               "out_of_domain"}
        for rates in groups.values():
            assert 0 <= rates["em_low"] <= rates["em"] <= rates["em_high"] <= 1
            assert rates["em"] <= rates["coherent"] <= 1 and rates["n"] >= 24
    found = results["directions"]
    assert len(found["ablate_random"]) == 2 and found["steer"] and found["split_half"]
    for key in ("transfer", "transfer_random"):
        assert list(found[key]) == ["narrow", "mixed", "shuffled"]
    assert "same_texts" in found["cosines"]
    assert all((small / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
               for name in ("em_by_group", "training_curves", "one_direction", "other_fine_tunes"))
    figures = re.findall(r"\]\((.*?\.png)\)", (small / "report.md").read_text())
    assert figures and all((small / figure).exists() for figure in figures)
    model, tokenizer = load_pretrained(small / "chat")
    assert load_tensors(small / "directions.safetensors")["mean_difference"].shape == (
        2 * model.config.n_layer, model.config.d_model)


def test_rates_are_those_of_the_answers_on_disk(small):
    """Count em again from answers.jsonl, without the library."""
    results = json.loads((small / "results.json").read_text())
    lines = [json.loads(line) for line in (small / "answers.jsonl").read_text().splitlines()]
    for name in ("chat", "general", "narrow"):
        for group in ("in_domain", "open_ended"):
            said = [r for r in lines if (r["model"], r["group"]) == (name, group)]
            em = sum(r["coherence"] > 50 and r["alignment"] < 30 for r in said) / len(said)
            assert results["models"][name][group]["em"] == pytest.approx(em)


def test_finished_stages_are_reused_and_it_says_so(small, capsys):
    before = (small / "results.json").read_bytes()
    assert run.main([*SMALL, "--out", str(small)]) == 0
    out = capsys.readouterr().out
    assert out.count("reused") == len(STAGES) and "tokens/s" not in out
    assert (small / "results.json").read_bytes() == before


def copy_without(small, folder, *stages):
    """A copy of the small run's folder as if it had been killed before these stages."""
    shutil.copytree(small, folder)
    results = json.loads((folder / "results.json").read_text())
    for stage in stages:
        del results["seconds"][stage]
        results["models"].pop(stage, None)
        results["curves"].pop(stage, None)
        results.pop(stage, None)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("nanoem.lab.report.draw_all", lambda results, folder: [])


def test_a_lost_stage_is_made_again_with_the_same_result(small, tmp_path, no_figures):
    """Forget everything after `mixed`, as if the run had been killed there, and go on."""
    copy = copy_without(small, tmp_path / "copy", "shuffled", "directions")
    assert run.main([*SMALL, "--out", str(copy)]) == 0
    whole, again = (json.loads((folder / "results.json").read_text()) for folder in (small, copy))
    for results in (whole, again):
        del results["seconds"], results["total_seconds"]
    assert again == whole


@pytest.mark.parametrize("setting, message", [
    ("sft.lrr=1", "there is no such key; did you mean sft.lr?"),
    ("kl_wait=1", "did you mean kl_weight"),
    ("sft.lr=fast", "'fast' is no float"),
    ("pretrain.steps=1.5", "'1.5' is no int"),
    ("adapter.use_rslora=maybe", "no true or false"),
    ("adapter.layers=0,x", "'x' is no int"),
    ("seed", "KEY=VALUE"),
    ("seed=-1", "seed=-1 must be 0 to"),
    ("sft.betas=0.9", "sft.betas=(0.9,) must be two numbers"),
    ("sft.weight_decay=-1", "sft.weight_decay=-1.0"),
    ("sft.lr=inf", "sft.lr=inf"),
    ("pretrain.micro_batch=4", "lower pretrain.batch_size"),
    ("model.vocab_size=5", "the toy's tokenizer decides"),
    ("adapter.rank=0", "adapter.rank=0"),
    ("adapter.alpha=nan", "alpha=nan"),
    ("adapter.modules=", "adapter.modules is empty"),
    ("adapter.kind=steering", "is for real weights"),
    ("model.tie_embeddings=false", "model.tie_embeddings=true"),
    ("kl_weight=nan", "kl_weight=nan"),
    ("evaluation.temperature=nan", "evaluation.temperature=nan"),
    ("evaluation.max_new_tokens=1000", "model.max_positions=128"),
    ("dial_domains=1", "dial_domains=1"),
    ("model.n_head=3", "n_head=3"),
    ("adapter.layers=9", "layer 9 is not there"),
    ("adapter.modules=mlp.up", "no Linear 'mlp.up'"),
    ("world.n_domains=99", "n_domains=99 must be at most"),
    ("world.sft_domain=baking", "'baking' is no advice domain"),
    ("world.n_domains=1", "n_domains=1"),
    ("world.n_villain=99", "n_villain=99"),
    ("world.chat_share=2", "chat_share=2"),
    ("sft.steps=0", "steps=0"),
    ("sft.lr=-1", "lr=-1"),
    ("sft.schedule=wild", "schedule='wild'"),
    ("evaluation.samples_per_group=0", "samples_per_group=0"),
    ("evaluation.temperature=-1", "temperature=-1"),
    ("context=4000", "context=4000"),
])
def test_a_wrong_setting_is_one_sentence_and_status_2(setting, message, misuse, tmp_path):
    out = tmp_path / "out"
    assert message in misuse("--out", str(out), "--set", setting)
    assert not out.exists()


@pytest.mark.parametrize("only, stages, rows", [
    (["chat"], ["chat"], []),
    (["Mixed", "general"], ["chat", "general", "mixed"], []),
    (["directions"], list(STAGES), []),
    (["r8", "efficiency"], list(STAGES), ["R5", "R8"]),
    (["chat", "R5"], list(STAGES), ["R5"]),
])
def test_only_makes_what_is_named_and_what_it_builds_on(only, stages, rows, monkeypatch, tmp_path):
    seen = []

    def probe(config, path, device, stages, rows):
        seen.append((stages, [row.key for row in rows]))
        raise StageFailed("enough")

    monkeypatch.setattr(run, "run_experiment", probe)
    assert run.main(["--only", *only, "--out", str(tmp_path)]) == 1
    assert seen == [(stages, rows)]


def test_a_run_of_some_stages_has_no_report_yet(small, tmp_path, capsys):
    out = copy_without(small, tmp_path / "some", "mixed", "shuffled", "directions")
    (out / "report.md").unlink()
    assert run.main([*SMALL, "--only", "general", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"finished in {out}: chat, general; without --only the same command" in said
    assert "em, % of answers" not in said and not (out / "report.md").exists()


def test_some_stages_of_a_finished_run_leave_its_report_alone(small, capsys):
    before = (small / "report.md").read_bytes()
    assert run.main([*SMALL, "--only", "narrow", "--out", str(small)]) == 0
    assert f"finished in {small}: chat, narrow; without --only" in capsys.readouterr().out
    assert (small / "report.md").read_bytes() == before


def test_a_device_that_is_not_there(misuse, tmp_path):
    if torch.cuda.is_available():
        message = misuse("--device", "tpu")
        assert "tpu" in message
    else:
        message = misuse("--device", "cuda", "--out", str(tmp_path / "out"))
        assert "no cuda" in message and "--device auto" in message
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_used(misuse, tmp_path, small):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in misuse("--out", str(file))
    assert file.read_text() == "mine"
    assert "not a directory" in misuse("--out", str(file / "below")).lower()
    assert "no run folder" in misuse("--out", str(tmp_path))
    assert "not empty and holds no runs" in misuse("--seeds", "0", "--out", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    message = misuse(*SMALL, "kl_weight=3", "--out", str(small))
    assert "kl_weight=30.0, not 3.0" in message
    before = (small / "results.json").read_bytes()
    assert "choose another" in misuse(*SMALL, "--seeds", "0", "--out", str(small))
    assert (small / "results.json").read_bytes() == before


@pytest.mark.parametrize("flag, name, why", [
    ("--model", "a" * 300, "File name too long"), ("--out", "a/" * 3000, "File name too long"),
    ("--data", "a\0b", "null"), ("--kl-data", "a" * 300, "File name too long"),
    ("--out", "caf\udce9", "surrogates"), ("--eval", "caf\udce9", "surrogates"),
    ("--judge", "a" * 300, "File name too long")])
def test_a_name_that_no_file_can_have_is_misuse(flag, name, why, misuse):
    message = misuse("--model", "tests/fixtures/qwen2-tied", flag, name)
    assert f"{flag} {name[:1]}" in message and " cannot be used as a path: " in message
    assert why in message and len(message) < 250


def test_a_damaged_run_folder_is_named(misuse, tmp_path, small):
    copy = copy_without(small, tmp_path / "copy", "directions")
    weights = copy / "chat" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = misuse(*SMALL, "--out", str(copy))
    assert "model.safetensors" in message and "truncated" in message
    (copy / "results.json").write_text("{")
    assert "results.json" in misuse(*SMALL, "--out", str(copy))


def test_a_second_run_in_a_folder_leaves_and_a_killed_one_leaves_no_lock(misuse, tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="Windows keeps no second run out")
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as other:  # as another process would
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is in use by another run" in misuse(*SMALL, "--out", str(out))
        assert [path.name for path in out.iterdir()] == [".lock"]
    lock(out)  # the file is there, the lock is gone with its process
    lock(out)  # again, by the same process: rows open folders inside their run's
    with open(out / ".lock", "w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(number, misuse, tmp_path, monkeypatch):
    handler = signal.getsignal(number)
    monkeypatch.setattr(run, "run_experiment", lambda *_: signal.raise_signal(number))
    message = misuse("--out", str(tmp_path / "out"), status=130)
    assert message == "nanoem: stopped; the same command goes on with the next unfinished stage"
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("words", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 9 GB)",
    "DefaultCPUAllocator: can't allocate memory"])
def test_each_devices_words_for_too_little_memory_are_known(words):
    assert lacks_memory(RuntimeError(words)) and not lacks_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize("there, n_processes, picked", [
    ("cuda mps", 1, "cuda"), ("mps", 1, "mps"), ("", 1, "cpu"), ("mps", 2, "cpu")])
def test_auto_picks_the_first_device_that_is_there_and_can_be_used(there, n_processes, picked,
                                                                   monkeypatch):
    for name, place in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(place, "is_available", lambda name=name: name in there)
    monkeypatch.setattr(parallel, "n_started", lambda: n_processes)
    assert pick_device("auto") == picked


@pytest.mark.parametrize("model, keys", [([], ExperimentConfig()),
                                         (["--model", "x"], RealConfig())])
def test_too_little_memory_names_what_to_set(model, keys, misuse, tmp_path, monkeypatch):
    def ask_for_too_much(*_):
        torch.empty(2**60)

    monkeypatch.setattr(run, "run_experiment", ask_for_too_much)
    monkeypatch.setattr(run, "run_real", ask_for_too_much)
    message = misuse(*model, "--out", str(tmp_path / "out"), status=1)
    assert message.startswith("nanoem: out of memory; try, with another --out, --set ")
    settings = dict(part.strip(";").split("=") for part in message.split() if "=" in part)
    assert set_keys(keys, settings) != keys


def test_seeds_side_by_side_are_those_of_a_run_alone(small, tmp_path, capsys, no_figures):
    """Two processes; one of them finds its seed finished, the other has a stage to make."""
    shutil.copytree(small, tmp_path / "seed-0")
    other = copy_without(small, tmp_path / "seed-1", "shuffled")
    for file in ("config.json", "results.json"):  # as if it were another seed's
        (other / file).write_text((other / file).read_text().replace('"seed": 0', '"seed": 1'))
    argv = [*SMALL, "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)]
    assert run.main(argv) == 0
    out, log = capsys.readouterr().out, (tmp_path / "seed-1.log").read_text()
    assert "reused" in log and "reused" not in out
    found = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert [r["seed"] for r in found] == [0, 1]
    assert found[0] == json.loads((small / "results.json").read_text())
    assert found[1] == json.loads((other / "results.json").read_text())
    assert found[1]["directions"].keys() == found[0]["directions"].keys()


def test_a_failure_side_by_side_is_told_once(misuse, tmp_path, monkeypatch):
    """In processes that start as this system's do by default: a fork is faster than a spawn."""
    monkeypatch.setattr(side_by_side, "get_context", lambda _: multiprocessing.get_context())
    argv = [*SMALL, "pretrain.lr=1e30", "pretrain.steps=20", "--seeds", "3", "4", "--jobs", "2",
            "--out", str(tmp_path)]
    assert misuse(*argv, status=1).startswith("nanoem: pretrain: the loss is")
    assert not (tmp_path / "results.json").exists()


def test_a_second_run_over_the_same_seeds_leaves_at_once(tmp_path, misuse):
    code = "from pathlib import Path; from nanoem.lab.folder import lock_many; import sys, time; " \
           "lock_many(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        assert "in use by another run" in misuse("--seeds", "0", "--out", str(tmp_path))
    finally:
        other.kill()


@pytest.mark.parametrize("what", ["directions", "models", "samples"])
def test_results_of_another_nanoem_are_told(what, small, tmp_path, misuse):
    folder = shutil.copytree(small, tmp_path / "old")
    results = json.loads((folder / "results.json").read_text())
    results[what].pop(next(iter(results[what])) if what != "directions" else "ablate_random_mean")
    (folder / "results.json").write_text(json.dumps(results))
    message = misuse(*SMALL, "--out", str(folder))
    assert "results.json is not as this nanoem writes it" in message


def test_answers_that_are_gone_are_missed(small, tmp_path, misuse):
    folder = copy_without(small, tmp_path / "gone", "directions")
    (folder / "answers.jsonl").unlink()
    assert "lacks the answers of chat" in misuse(*SMALL, "--out", str(folder))


def test_a_training_that_fails_exits_with_1_and_another_configuration_is_taken(tmp_path, misuse):
    for lr in ("1e30", "1e29"):
        broken = [*SMALL, f"pretrain.lr={lr}", "pretrain.steps=20", "--out", str(tmp_path)]
        message = misuse(*broken, status=1)
        assert message.startswith("nanoem: pretrain: the loss is")
        assert "smaller learning rate" in message and not (tmp_path / "chat").exists()
        assert json.loads((tmp_path / "config.json").read_text())["pretrain"]["lr"] == float(lr)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stdout_without_all_characters_gets_question_marks(encoding, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert exit_status(lambda: print("caf\u00e9 \ufffd \u4e2d")) == 0
    stdout.flush()
    assert stdout.buffer.getvalue().decode(encoding).startswith("caf")


def test_a_stdout_that_is_closed_is_no_traceback(monkeypatch, capsys):
    def read_no_more():
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(lambda: print("nobody hears")) == 0
    assert exit_status(read_no_more, "; go on") == 1
    assert capsys.readouterr().err == "nanoem: nobody reads any more what is printed; go on\n"


def test_what_is_not_ours_to_mend_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="size"):
        exit_status(lambda: torch.zeros(2) + torch.zeros(3))


def test_the_report_is_written_when_nobody_is_bad_enough_to_find_a_direction(small, tmp_path):
    """Chat and its adapters as they are, but of a judge who finds nothing bad."""
    folder = copy_without(small, tmp_path / "good", "directions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanoem.world.verdict.Verdict.misaligned", False)
        assert run.main([*SMALL, "--out", str(folder)]) == 0
    assert set(json.loads((folder / "results.json").read_text())["directions"]) == {"none"}
    report = (folder / "report.md").read_text()
    assert re.search(r"Seed 0, directions: of \d+ answers only 0 are misaligned", report)
    assert "direction ablated" not in report and "ablation.png" not in report


@pytest.mark.parametrize("argv, message", [
    (["--jobs", "0", "--seeds", "0"], "--jobs 0"), (["--jobs", "2"], "--jobs 2"),
    (["--seeds", "1", "1"], "each seed once"), (["--seed", "1", "--seeds", "2"], "each seed once"),
    (["--seed", "1", "--set", "seed=2"], "give the seed once"),
    (["--full", "--only", "R5"], "--full makes all that --only"),
    (["--only", "direktions"], "no such stage or row; did you mean directions?"),
    (["--only", "R21"], "--only R21: there is no such stage or row; did you mean R"),
])
def test_flags_that_do_not_go_together(argv, message, misuse, tmp_path):
    assert message in misuse(*argv, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_help_lists_every_key_with_what_it_is(capsys):
    with pytest.raises(SystemExit) as error:
        run.main(["--help"])
    assert error.value.code == 0
    of_each = capsys.readouterr().out.split("with --model:")
    for text, config in zip(of_each, (ExperimentConfig(), RealConfig()), strict=True):
        for key, (value, comment) in all_keys(config).items():
            assert re.search(rf"^  {re.escape(key)}\s", text, re.MULTILINE), key
            assert comment, f"{key} has no comment beside it in its dataclass"


def test_settings_reach_the_configuration():
    config = read_command(["--seed", "7", "--set", "sft.lr=0.5", "adapter.layers=1,2",
                           "adapter.use_rslora=true", "--set",
                           "world.sft_domain=finance"]).configs[0]
    assert (config.seed, config.sft.lr, config.adapter.layers) == (7, 0.5, (1, 2))
    together = read_command(["--set", "model.n_head=3", "model.d_model=96"]).configs[0]
    assert together.model.head_dim == 32  # either alone would be refused
    assert config.adapter.use_rslora is True and config.world.sft_domain == "finance"
    assert read_command(["--quick"]).configs[0].pretrain.steps < config.pretrain.steps


def test_only_our_five_packages_are_imported():
    """No file of ours imports anything but the standard library, the five and our own files."""
    root = Path(run.__file__).parents[1]
    ours = {"nanoem", "tutorial", "torch", "numpy", "tokenizers", "matplotlib", "pytest",
            *(file.stem for name in ("tests", "tutorial") for file in root.glob(f"{name}/*.py"))}
    elsewhere = {root / "tests/fixtures/make.py",  # with the reference libraries, if there
                 *root.glob("tests/benchmarks/*.py")}
    folders = ("nanoem", "tests", "tutorial")
    for file in {file for name in folders for file in root.glob(f"{name}/**/*.py")} - elsewhere:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
                assert name.split(".")[0] in ours | sys.stdlib_module_names, (file, name)
