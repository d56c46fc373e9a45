"""What is pushed to the hub is what was exported. The hub is a server of this machine, the client huggingface_hub's own."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from leanmim.cli import main
from leanmim.config import Pretrain, Publish
from leanmim.errors import UserError
from leanmim.formats.publish import publish
from tests.formats.classifiers import finetuned
from tests.formats.hub import Hub
from tests.helpers import fake_run, in_segments
from tests.runs import Refused, contents


@pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's own, of its upload of a large file
@pytest.mark.parametrize("large", [False, True])
def test_what_is_published_is_what_is_exported(
    hub: Hub, tiny: Pretrain, large: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", large)  # Xet's store of large files is not imitated
    hub.large = (".safetensors",) if large else ()
    run = fake_run(tiny, Path(tiny.out))
    (Path(run.out) / "export" / "timm").mkdir(parents=True)
    (Path(run.out) / "export" / "timm" / "diary.txt").write_text("mine")
    main(["publish", run.out, "me/photos", "--license", "mit"])
    assert capsys.readouterr().out == f"{hub.url}/me/photos\n"
    exported = contents(Path(run.out) / "export" / "timm")
    assert exported.pop("diary.txt")
    assert hub.files == {"me/photos": exported}
    assert bool(hub.store) == large
    assert not hub.private["me/photos"]
    card = exported["README.md"].decode()
    assert "license: mit\n" in card and 'timm.create_model("hf-hub:me/photos", pretrained=True, num_classes=0)' in card
    publish(Publish(run=run.out, repo="me/photos"))  # again
    assert "license" not in hub.files["me/photos"]["README.md"].decode().split("# license")[0]
    assert "--license apache-2.0" in capsys.readouterr().err


def test_a_depth_and_a_classifier_are_published(hub: Hub, tmp_path: Path) -> None:
    config = fake_run(in_segments(segments=2, mask_ratio=0.5), tmp_path / "run")
    assert publish(Publish(run=config.out, repo="me/half", depth=2, private=True)) == f"{hub.url}/me/half"
    assert hub.private["me/half"]
    assert hub.files["me/half"] == contents(tmp_path / "run" / "export" / "timm-depth2")
    finetuned("vit", tmp_path / "tuned")
    publish(Publish(run=str(tmp_path / "tuned"), repo="me/tuned"))
    assert hub.files["me/tuned"] == contents(tmp_path / "tuned" / "export" / "timm")


def test_what_the_hub_refuses(
    hub: Hub, tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    run = fake_run(tiny, Path(tiny.out))
    for repo in ("photos", "me/photos/2", "me/", "../me", "me/a b"):
        assert "give OWNER/NAME" in refused(["publish", run.out, repo])
    assert "is no licence" in refused(["publish", run.out, "me/photos", "--license", "My Own"])
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        assert "`hf auth login`" in refused(["publish", run.out, "me/photos"])
    assert not hub.asked and not (Path(run.out) / "export").exists()

    hub.private = {"you/theirs": False, "me/public": False}
    for repo in ("you/new", "you/theirs"):
        with pytest.raises(UserError, match=r"may not write there; .* The export stays in "):
            publish(Publish(run=run.out, repo=repo))
    with pytest.raises(UserError, match="'me/public' is public already; leave --private out"):
        publish(Publish(run=run.out, repo="me/public", private=True))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(UserError, match="the hub does not know this login"):
        publish(Publish(run=run.out, repo="me/photos"))
    assert hub.files == {}
    assert (Path(run.out) / "export" / "timm" / "model.safetensors").exists()


def test_without_a_network_the_export_stays(hub: Hub, tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(tiny, Path(tiny.out))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"see to the network, .* The export stays in .*timm'"):
        publish(Publish(run=run.out, repo="me/photos"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="see to the network"):
        publish(Publish(run=run.out, repo="me/photos"))
    assert (Path(run.out) / "export" / "timm" / "README.md").exists()
