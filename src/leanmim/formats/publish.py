"""`leanmim publish`: an export for timm, pushed to the Hugging Face hub by huggingface_hub."""

import re
import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token

from leanmim.config import Export, Publish
from leanmim.errors import UserError
from leanmim.formats import write_export

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
PUSHED = ["README.md", "config.json", "model.safetensors"]  # and nothing else that may lie in the folder
REMEDIES = {  # by the status of the hub's answer
    401: "the hub does not know this login; `hf auth login` again, or set HF_TOKEN, with a token that may write",
    403: "this login may not write there; give OWNER/NAME of your own or of an organisation's, and a token that may write",
    404: "it is not there for this login; give OWNER/NAME of your own or of an organisation's, and a token that may write",
}


def publish(config: Publish) -> str:
    """Export a run for timm, and push weights, description and model card to the hub.

    Returns:
        The address of the repository.

    Raises:
        UserError: the run cannot be exported, nobody is logged in, the hub cannot be reached or refuses. The export stays.
    """
    config.check()
    if not REPO.fullmatch(config.repo):
        raise UserError(f"{config.repo!r} is no repository of the hub; give OWNER/NAME")
    if get_token() is None:
        raise UserError(
            "nobody is logged in to the Hugging Face hub; `hf auth login`, or set HF_TOKEN, then publish again"
        )
    own = Export(run=config.run, depth=config.depth, license=config.license)
    (folder,), _ = write_export(own, repo=config.repo)
    if config.license is None:
        print("the model card names no licence; --license apache-2.0, for example, puts one there", file=sys.stderr)
    try:
        return push(config, folder)
    except UserError:
        raise
    except Exception as error:  # of the network, of the hub: each version of huggingface_hub has its own
        status = getattr(getattr(error, "response", None), "status_code", 0)
        remedy = REMEDIES.get(status, "see to the network, then give the same command again")
        raise UserError(
            f"{config.repo!r} cannot be pushed to: {remedy}. The export stays in {str(folder)!r} ({type(error).__name__}: {error})"
        ) from error


def push(config: Publish, folder: Path) -> str:
    """Make the repository where it is not there, and push the files. Errors are huggingface_hub's.

    Raises:
        UserError: the repository is public, and should be private.
    """
    hub = HfApi()
    address = hub.create_repo(config.repo, private=config.private or None, exist_ok=True)
    if config.private and not hub.model_info(config.repo).private:  # it was there before
        raise UserError(
            f"{config.repo!r} is public already; leave --private out, give another NAME, or make it private on the hub"
        )
    hub.upload_folder(
        repo_id=config.repo, folder_path=folder, allow_patterns=PUSHED, commit_message="Upload by leanmim publish"
    )
    return str(address)
