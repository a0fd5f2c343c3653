import dataclasses
import json

import pytest
import torch

import fedgradnorm
from fedgradnorm import (
    ConfigError,
    FederationError,
    FedGradNorm,
    FedGradNormWarning,
    RunError,
    evaluate_run,
    load_model,
    resume,
    train,
)
from fedgradnorm.api import run
from fedgradnorm.build import build_federation
from fedgradnorm.config import load_config
from fedgradnorm.evaluation import evaluate
from fedgradnorm.federations import digits
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.summary import rounds_to, silent_texts
from tests.helpers import batch_norm_encoder, dropout_encoder, small_federation, timeless

QUICK = {"num_rounds": 4, "head_steps": 2, "encoder_steps": 2, "batch_size": 8, "eval_every": 2}
QUICK_WORDS = [f"train.{key}={value}" for key, value in QUICK.items()]


def run_digits(folder, *words, **options):
    return run(
        load_config(None, ["federation.name=digits", f"run.dir={folder}", *QUICK_WORDS, *words]),
        **options,
    )


def metrics(folder):
    return timeless(Run(folder).rows())


def test_one_seed_gives_identical_metrics_and_models_and_another_differs(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run_digits(tmp_path / name, f"train.seed={seed}")
    assert json.dumps(metrics(tmp_path / "one")) == json.dumps(metrics(tmp_path / "same"))
    assert json.dumps(metrics(tmp_path / "one")) != json.dumps(metrics(tmp_path / "other"))
    for file in ("encoder.safetensors", "heads/mass.safetensors"):
        assert (tmp_path / "one/models" / file).read_bytes() == (
            tmp_path / "same/models" / file
        ).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.fraction_train=0.5"],
        ["weighting.group_by=task", "federation.clients_per_task=2"],
    ],
)
def test_the_order_of_clients_changes_nothing_but_the_order_of_rows(tmp_path, words):
    run_digits(tmp_path / "one", *words, "federation.tasks=['class', 'parity', 'loop']")
    run_digits(tmp_path / "turned", *words, "federation.tasks=['loop', 'class', 'parity']")
    one, turned = metrics(tmp_path / "one"), metrics(tmp_path / "turned")
    assert one != turned
    by_client = [sorted(map(json.dumps, rows)) for rows in (one, turned)]
    assert by_client[0] == by_client[1]


@pytest.mark.parametrize("encoder", [batch_norm_encoder, dropout_encoder])
@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_every_loaded_model_scores_what_the_summary_says(tmp_path, encoder, buffers):
    federation = small_federation(encoder=encoder, buffers=buffers)
    result = train(federation, run_dir=tmp_path / "run", **QUICK)
    summary = Run(tmp_path / "run").summary()
    assert summary == json.loads(json.dumps(result.summary))
    for client in federation.clients:
        for model in (load_model(tmp_path / "run", client.id, federation), result.model(client.id)):
            evaluation = evaluate(client.task, model.encoder, model.head, client.test_data)
            assert evaluation.metrics == summary["clients"][client.id]["metrics"]
            assert evaluation.loss == summary["clients"][client.id]["test_loss"]
            with torch.no_grad():
                assert torch.equal(
                    model(client.test_data[0]), model.head(model.encoder(client.test_data[0]))
                )


def test_local_buffers_differ_between_clients_and_averaged_ones_do_not():
    def running_means(buffers):
        result = train(small_federation(encoder=batch_norm_encoder, buffers=buffers), **QUICK)
        return [result.model(id).encoder[1].running_mean for id in "abc"]

    assert not torch.equal(*running_means("local")[:2])
    assert torch.equal(*running_means("averaged")[:2])


def test_a_configured_run_is_loaded_and_evaluated_from_its_folder_alone(tmp_path):
    result = run_digits(
        tmp_path / "run",
        "federation.tasks=['mass', 'class']",
        "model.name=mlp",
        "model.hidden=[16, 8]",
    )
    model = load_model(tmp_path / "run", "class")
    assert [type(layer).__name__ for layer in model.encoder] == [
        "Flatten",
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
    ]
    evaluations = evaluate_run(tmp_path / "run")
    for id, evaluation in evaluations.items():
        assert dict(evaluation.metrics) == result.summary["clients"][id]["metrics"]
    with pytest.raises(FederationError, match="there is no client 'clas'; did you mean 'class'"):
        load_model(tmp_path / "run", "clas")


def test_the_resolved_config_of_a_run_repeats_it(tmp_path):
    run_digits(
        tmp_path / "one",
        "weighting.gamma=0.3",
        "train.participants=[['class', 'mass'], ['loop', 'parity']]",
    )
    run(load_config(tmp_path / "one/config.toml", [f"run.dir={tmp_path / 'two'}"]))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    versions = Run(tmp_path / "one").config.versions
    assert versions["fedgradnorm"] == fedgradnorm.__version__
    assert versions["torch"] == torch.__version__


def test_rows_have_what_was_promised_and_hold_together(tmp_path):
    result = run_digits(
        tmp_path / "run",
        "train.participants=[['class', 'mass'], ['loop', 'class', 'mass', 'parity']]",
        "weighting.gamma=1",
    )
    rows = Run(tmp_path / "run").rows()
    assert rows == json.loads(json.dumps(result.rows))
    assert [(row["round"], row["client"]) for row in rows[:5]] == [
        (1, "class"),
        (1, "parity"),
        (1, "loop"),
        (1, "mass"),
        (2, "class"),
    ]
    for row in rows:
        assert (row["metric"] is not None) == (row["round"] in (1, 2, 4))
        if not row["participated"]:
            assert row["round"] == 1
            assert (row["loss"], row["weight"], row["bytes_up"]) == (None, 1.0, 0)
            continue
        assert row["inverse_training_rate"] == row["loss"] / row["initial_loss"]
        assert row["bytes_up"] > row["bytes_down"] > 0
    for round in (2, 3, 4):
        here = [row for row in rows if row["round"] == round]
        assert sum(row["weight"] for row in here) == pytest.approx(4)
        before = {row["client"]: row["weight"] for row in rows if row["round"] == round - 1}
        pushes = [before[row["client"]] * row["grad_norm"] for row in here]
        rates = [row["inverse_training_rate"] for row in here]
        for row, rate in zip(here, rates, strict=True):
            assert row["target"] == pytest.approx(sum(pushes) / 4 * rate / (sum(rates) / 4))


def test_the_summary_counts_rounds_to_targets(tmp_path):
    words = [
        "train.num_rounds=30",
        "run.loss_targets=[0.97, 0.0]",
        "run.metric_targets.loop=0.5",
        "run.metric_targets.mass=0.0",
    ]
    result = run_digits(tmp_path / "run", *words)
    loop, mass = result.summary["tasks"]["loop"], result.summary["tasks"]["mass"]
    ratios = [row["inverse_training_rate"] for row in result.rows if row["client"] == "loop"]
    means = [
        sum(ratios[max(0, end - 5) : end]) / len(ratios[max(0, end - 5) : end])
        for end in range(1, 31)
    ]
    assert loop["rounds_to"]["loss ratio 0.97"] == next(
        round for round, mean in enumerate(means, 1) if mean <= 0.97
    )
    assert loop["rounds_to"]["loss ratio 0"] is None
    assert loop["rounds_to"]["accuracy 0.5"] == 1
    assert mass["rounds_to"]["mean absolute error 0"] is None
    values = {
        row["round"]: row["metric"]
        for row in result.rows
        if row["client"] == "mass" and row["metric"] is not None
    }
    assert mass["metric"]["first"] == values[1]
    assert mass["metric"]["best"] == min(values.values()) == values[mass["metric"]["best_round"]]
    assert mass["metric"]["last"] == values[30]


def test_a_run_folder_that_exists_is_left_alone_unless_told(tmp_path):
    run_digits(tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(
        RunError,
        match="exists: choose another one, or replace it: --overwrite on the command line, overwrite=True in Python",
    ):
        run_digits(tmp_path / "run")
    with pytest.raises(ConfigError):
        run_digits(tmp_path / "run", "weighting.gamma=-1", overwrite=True)
    with pytest.raises(ConfigError, match="metric_targets.x"):
        run_digits(tmp_path / "run", "run.metric_targets.x=1", overwrite=True)
    with pytest.raises(FederationError, match="no client 'x'"):
        run_digits(tmp_path / "run", "train.participants=[['class'], ['x']]", overwrite=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    run_digits(tmp_path / "run", "train.seed=1", overwrite=True)
    assert Run(tmp_path / "run").config.train.seed == 1


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds what no run writes, such as 'thesis.txt'"):
        run_digits(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "config.toml").write_text("[train"),
            "config.toml: cannot be read",
        ),
        (lambda folder: (folder / "summary.json").unlink(), "summary.json: cannot be read"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json: expected JSON"),
        (
            lambda folder: (folder / "summary.json").write_text("[]"),
            "summary.json: the whole: Input should be a valid dictionary",
        ),
        (
            lambda folder: (folder / "metrics.jsonl").write_text("{}\n{\n"),
            "metrics.jsonl line 2: expected JSON",
        ),
        (
            lambda folder: (folder / "models/encoder.safetensors").write_bytes(b"x" * 40),
            "expected a sound safetensors file",
        ),
        (lambda folder: (folder / "models/heads/class.safetensors").unlink(), "class.safetensors"),
        (
            lambda folder: (folder / "models/encoder.safetensors").write_bytes(
                (folder / "models/heads/class.safetensors").read_bytes()
            ),
            "the saved models do not fit the federation",
        ),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(tmp_path, damage, message):
    run_digits(tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(RunError, match=message):
        opened = Run(tmp_path / "run")
        opened.rows()
        opened.summary()
        load_model(tmp_path / "run", "class")


def test_a_folder_without_a_run():
    with pytest.raises(RunError, match="is no run: expected a folder with a config.toml"):
        Run("nowhere")


def test_a_run_given_in_python_needs_its_federation_to_load(tmp_path):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    with pytest.raises(RunError, match="given in Python: pass it as federation="):
        load_model(tmp_path / "run", "a")


def test_train_takes_a_weighting_or_its_name_and_checks_its_settings(tmp_path):
    by_name = train(small_federation(), "fedgradnorm", **QUICK)
    by_object = train(small_federation(), FedGradNorm(), run_dir=tmp_path / "run", **QUICK)
    assert timeless(by_name.rows) == timeless(by_object.rows)
    assert by_name.weights == by_object.weights
    assert Run(tmp_path / "run").config.weighting.name == "fedgradnorm"
    with pytest.raises(
        ConfigError, match=r"unknown key 'train.num_round'; did you mean 'num_rounds'"
    ):
        train(small_federation(), num_round=3)
    with pytest.raises(ConfigError, match="there is no weighting 'eqal'"):
        train(small_federation(), "eqal")


def test_training_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    train(small_federation(encoder=dropout_encoder), **QUICK)
    assert torch.equal(before, torch.get_rng_state())


def test_the_model_table_replaces_encoder_norm_layer_and_buffers():
    words = [
        "federation.name=digits",
        "model.name=mlp",
        "model.hidden=[12, 6]",
        "model.norm_layer=1",
        "model.buffers=averaged",
    ]
    federation = build_federation(load_config(None, words))
    assert federation.num_features == 6
    assert (federation.norm_layer, federation.buffers) == ("1", "averaged")
    with pytest.raises(ConfigError, match=r"unknown key 'model.hiden'; did you mean 'hidden'"):
        build_federation(
            load_config(None, ["federation.name=digits", "model.name=mlp", "model.hiden=[3]"])
        )
    with pytest.raises(ConfigError, match="model.hidden: expected sizes from 1"):
        build_federation(
            load_config(None, ["federation.name=digits", "model.name=mlp", "model.hidden=[0]"])
        )
    with pytest.raises(FederationError, match="norm_layer 'fc' names no encoder parameter"):
        build_federation(load_config(None, ["federation.name=digits", "model.norm_layer=fc"]))


def test_options_of_the_default_model_are_refused():
    with pytest.raises(ConfigError, match="model.hidden: the default model has no options"):
        build_federation(load_config(None, ["federation.name=digits", "model.hidden=[3]"]))


def test_a_client_without_test_data_has_no_metric():
    federation = small_federation()
    clients = [
        dataclasses.replace(client, test=None) if client.id == "b" else client
        for client in federation.clients
    ]
    result = train(dataclasses.replace(federation, clients=clients), **QUICK)
    assert {row["client"] for row in result.rows if row["metric"] is not None} == {"a", "c"}
    assert result.summary["clients"]["b"]["metrics"] == {}


def test_on_round_sees_every_round():
    seen = []
    train(
        digits.make(0), on_round=lambda rows: seen.append([row["round"] for row in rows]), **QUICK
    )
    assert seen == [[round] * 4 for round in (1, 2, 3, 4)]


def test_a_run_that_diverges_ends_with_gaps_and_counts_what_it_dropped(tmp_path):
    words = [
        "federation.tasks=['mass', 'loop']",
        "train.num_rounds=12",
        "train.encoder_lr=500",
        "train.head_lr=500",
        "train.min_clients=0",
    ]
    with pytest.warns(FedGradNormWarning) as said:
        result = run_digits(tmp_path / "run", *words)
    for client in ("mass", "loop"):
        assert any(
            f"client '{client}' seldom counted: 11 of 12 reports were dropped"
            in str(warning.message)
            for warning in said
        )
    assert result.summary["dropped"] > 0
    assert all(weight > 0 for weight in result.weights.values())
    dropped = [row for row in Run(tmp_path / "run").rows() if row["dropped"]]
    assert len(dropped) == result.summary["dropped"]
    assert all(row["loss"] is None for row in dropped)


def test_a_single_lucky_round_reaches_no_target():
    noisy = {1: 0.9, 2: 0.4, 3: 0.9, 4: 0.8, 5: 0.8, 6: 0.6, 7: 0.3, 8: 0.4, 9: 0.4}
    assert rounds_to(noisy, 0.51) == 9, "(0.8 + 0.6 + 0.3 + 0.4 + 0.4) / 5"
    assert (
        rounds_to({round: -value for round, value in noisy.items()}, -0.51, higher_is_better=True)
        == 9
    )
    assert rounds_to(noisy, 0.4) is None
    assert rounds_to({1: 0.9, 20: 0.3}, 0.5) == 20, (
        "a test every few rounds has no neighbours to be averaged with"
    )


@pytest.mark.parametrize("run", [5, None, b"run", ["run"]])
@pytest.mark.parametrize(
    "call", [resume, evaluate_run, lambda run, federation: load_model(run, "a", federation)]
)
def test_what_is_no_path_of_a_run_is_named(call, run):
    with pytest.raises(RunError, match="run: expected the path of a run's folder, found"):
        call(run, small_federation())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda run: evaluate_run(run, "x"),
            FederationError,
            "federation: expected a Federation, found str",
        ),
        (
            lambda run: load_model(run, "a", "x"),
            FederationError,
            "federation: expected a Federation, found str",
        ),
        (
            lambda run: resume(run, "x"),
            FederationError,
            "federation: expected a Federation, found str",
        ),
        *(
            (
                lambda run, client=client: load_model(run, client, small_federation()),
                FederationError,
                "client: expected a client's id, found",
            )
            for client in (5, None, ["a"])
        ),
        *(
            (
                lambda run, rounds=rounds: resume(run, small_federation(), num_rounds=rounds),
                ConfigError,
                "num_rounds: expected a whole number",
            )
            for rounds in ("8", 4.5, True, 0, -1)
        ),
        (
            lambda run: resume(run, small_federation(), on_message=5),
            ConfigError,
            r"on_message: expected a function on_message\(message\)",
        ),
        (
            lambda run: resume(run, small_federation(), on_round=lambda: 0),
            ConfigError,
            r"can be called as on_round\(rows\)",
        ),
        *(
            (
                lambda run, engine=engine: train(small_federation(), engine=engine),
                ConfigError,
                "engine: expected a name, such as 'vectorized'",
            )
            for engine in (None, 5, object())
        ),
    ],
)
def test_wrong_arguments_are_named_with_what_was_expected(trained, call, error, message):
    with pytest.raises(error, match=message):
        call(trained)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(small_federation(), run_dir=folder, engine="reference", **QUICK)
    return folder


def test_none_in_place_of_a_function_is_allowed(trained):
    assert (
        resume(
            trained, small_federation(), on_round=None, should_stop=None, on_message=None
        ).state.round
        == 4
    )


def test_a_client_that_was_never_asked_is_named_and_left_out_of_its_tasks_figures():
    with pytest.warns(
        FedGradNormWarning,
        match="clients 'b', 'c' were never trained: not among the participants of any round",
    ):
        result = train(small_federation(), participants=[["a"]], engine="reference", **QUICK)
    (task,) = result.summary["tasks"].values()
    client = result.summary["clients"]["a"]
    assert task["metric"]["last"] == client["metrics"]["accuracy"]
    assert task["metric"]["guess"] == client["guess"]["accuracy"]
    assert silent_texts(result.summary) == [
        "clients 'b', 'c' were never trained: not among the participants of any round"
    ]
