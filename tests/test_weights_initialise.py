"""Starting from the weights of a file or a run; a run's backbone at another size."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from leanmim.config import Cost, Export, Pretrain
from leanmim.costs import cost
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.formats import export
from leanmim.recipes import SIMMIM
from leanmim.run import Run, load, save
from leanmim.weights import initialise, load_backbone, restore
from tests.helpers import fake_run


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, while it resizes the tables
def test_the_readmes_swin_goes_to_another_size(tiny: Pretrain) -> None:
    swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(128,))
    run = fake_run(replace(SIMMIM, data=tiny.data, epochs=2, batch_size=4, blr=1e-4, **swin), Path(tiny.out))
    small, _, _ = load_backbone(run.out)
    large, _, _ = load_backbone(run.out, (224, 224))
    assert small.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 7**2
    assert large.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 13**2
    assert large(torch.randn(1, 3, 224, 224)).shape == (1, 192)


def test_start_from_a_timm_file(tiny: Pretrain, tmp_path: Path) -> None:
    """A classifier's checkpoint of another size: head left, positions resized, everything else taken."""
    other = timm.create_model(tiny.model, num_classes=5, img_size=64, **tiny.model_kwargs)
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    model = build(tiny)
    assert "encoder from" in initialise(model, str(tmp_path / "timm.safetensors"))
    own = model.encoder.backbone.state_dict()
    for name, value in other.state_dict().items():
        if not name.startswith("head"):
            assert name == "pos_embed" or torch.equal(own[name], value), name
    assert own["pos_embed"].shape[1] == 17

    torch.save({"state_dict": other.state_dict()}, tmp_path / "timm.pth")
    again = build(tiny)
    initialise(again, str(tmp_path / "timm.pth"))
    assert torch.equal(again.encoder.backbone.state_dict()["norm.weight"], own["norm.weight"])


def test_start_from_a_run_takes_the_decoder_where_it_fits(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))
    _, trained, _ = restore(run.out)
    for source in (run.out, str(Path(run.out) / "checkpoints" / "last.pt")):
        model = build(tiny)
        assert "encoder and decoder" in initialise(model, source)
        for name, value in trained.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
    smaller = build(replace(tiny, decoder_width=16))
    assert "its decoder has another shape" in initialise(smaller, run.out)
    assert torch.equal(smaller.encoder.backbone.norm.weight, trained.encoder.backbone.norm.weight)


def test_weights_of_another_model_are_refused(tiny: Pretrain, tmp_path: Path) -> None:
    model = build(tiny)
    other = timm.create_model(tiny.model, num_classes=0, img_size=32, **{**tiny.model_kwargs, "depth": 5})
    save_file(other.state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"12 weights that the model has not.*blocks\.4.*--model-kwargs"):
        initialise(model, str(tmp_path / "deep.safetensors"))
    wide = timm.create_model(tiny.model, num_classes=0, img_size=32, **{**tiny.model_kwargs, "embed_dim": 64})
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="another shape"):
        initialise(model, str(tmp_path / "wide.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        initialise(model, str(tmp_path / "broken.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        initialise(model, str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="neither a run folder"):
        initialise(model, str(tmp_path))


def test_start_from_an_export_of_ours(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))
    _, trained, _ = restore(run.out)
    folder = str(export(Export(run=run.out)))
    for source in (folder, f"local-dir:{folder}"):
        model = build(tiny)
        assert initialise(model, source) == f"encoder from {source}"
        for name, value in trained.encoder.backbone.state_dict().items():
            assert torch.equal(model.encoder.backbone.state_dict()[name], value), name
    grey = build(replace(tiny, channels=1))
    initialise(grey, f"local-dir:{folder}", channels=1)
    stem = trained.encoder.backbone.patch_embed.proj.weight
    torch.testing.assert_close(grey.encoder.backbone.patch_embed.proj.weight, stem.sum(1, keepdim=True))


NAME = "test_vit"


@pytest.mark.parametrize("source", [NAME, f"{NAME}.r160_in1k", f"hf-hub:timm/{NAME}.r160_in1k"])
def test_start_from_published_weights(source: str, tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is left, positions are resized from 160 px, everything else is taken."""
    config = replace(tiny, model=NAME, model_kwargs={})
    other = timm.create_model(NAME, num_classes=1000)
    description = {
        "source": "hf-hub",
        "hf_hub_id": source,
        "num_classes": 1000,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *_, **__: (description, NAME, {}))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: other.state_dict())
    model = build(config)
    before = torch.get_rng_state()
    assert initialise(model, source) == f"encoder from {source if ':' in source else NAME + '.r160_in1k'}"
    assert torch.equal(torch.get_rng_state(), before)
    own = model.encoder.backbone.state_dict()
    for name, value in other.state_dict().items():
        if not name.startswith("head"):
            assert name == "pos_embed" or torch.equal(own[name], value), name
    with pytest.raises(UserError, match=r"does not fit the model.*choose the --model"):
        initialise(build(tiny), source)
    five = build(replace(config, channels=5))
    initialise(five, source, channels=5)
    stem = other.patch_embed.proj.weight
    want = stem[:, [0, 1, 2, 0, 1]] * (3 / 5)  # timm repeats the colours, and keeps the sum
    torch.testing.assert_close(five.encoder.backbone.patch_embed.proj.weight, want)


def test_without_a_network_published_weights_are_refused_with_the_remedy(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(UserError, match=rf"no route to host.*Without a network.*timm/{NAME}\.r160_in1k.*--init model"):
        initialise(build(tiny), NAME)


def test_names_without_weights_are_refused(tiny: Pretrain) -> None:
    model = build(tiny)
    with pytest.raises(UserError, match=rf"timm has no weights of this name; nearest: {NAME}\.r160_in1k$"):
        initialise(model, f"{NAME}.r161_in1k")
    with pytest.raises(UserError, match=r"nearest: .*vit_tiny_patch16_224\."):
        initialise(model, "vit_tinny_patch16_224")


def test_a_model_by_tag_is_refused(tiny: Pretrain) -> None:
    """It would be trained from scratch."""
    with pytest.raises(UserError, match=rf"give --model {NAME}, .* --init {NAME}\.r160_in1k"):
        build(replace(tiny, model=f"{NAME}.r160_in1k", model_kwargs={}))
    with pytest.raises(UserError, match=rf"give --model {NAME}, "):
        cost(Cost(recipes=("mae",), model=f"{NAME}.r160_in1k"))


def test_a_run_of_version_0_1_0_may_have_a_tag(tiny: Pretrain) -> None:
    run = fake_run(tiny, Path(tiny.out))
    last = Run(Path(run.out)).last
    state = load(last)
    state["config"]["model"] += ".augreg_in21k"
    save(last, state)
    assert restore(run.out)[0].model == "vit_tiny_patch16_224"


def test_a_file_of_timm_is_told_by_what_it_holds(tiny: Pretrain, tmp_path: Path) -> None:
    """Not by its name, nor is one of leanmim."""
    other = timm.create_model(tiny.model, num_classes=5, img_size=32, **tiny.model_kwargs)
    for name in ("timm.pt", "timm.pth"):
        torch.save(other.state_dict(), tmp_path / name)
        assert initialise(build(tiny), str(tmp_path / name)).startswith("encoder from")
    ours = Run(Path(fake_run(tiny, Path(tiny.out)).out)).last.rename(tmp_path / "ours.pth")
    assert initialise(build(tiny), str(ours)).startswith("encoder and decoder from")
