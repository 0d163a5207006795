"""Private names of transformers: what a trainer uploads with `push_to_hub=True`."""

import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_delta import private
from hf_delta.errors import InputError
from hf_delta.public import check_files, public_files


logger = logging.getLogger(__name__)

# Parameters of each private method that is overridden or called, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finish_current_push": ("self",),
}


class SharedPushes(Trainer):
    """Mixin that stands before the trainer among the bases: it uploads weights, configuration, tokenizer and card, and no more.

    transformers uploads everything in `output_dir`, with `training_args.bin`, which holds the token, and TensorBoard's files,
    which are named after the host; and with `hub_strategy` `checkpoint` or `all_checkpoints` optimizer and random states.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As [`~transformers.Trainer.init_hf_repo`].

        Raises:
            `InputError`: what this run would upload is not for others, or nobody else could load it.
        """
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise InputError(
                f"hub_strategy: {self.args.hub_strategy.value} would upload optimizer and random states. Write every_save or end; "
                "a run that was stopped goes on from its own disk."
            )
        if (base := _local_base(self.model)) is not None:
            raise InputError(
                f"push_to_hub: the adapter's base model {base} is a local directory, which nobody else can load. Save the adapter, "
                "and push it with `hf-delta push <directory> --base_model_id <owner>/<name>`."
            )
        super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """As [`~transformers.Trainer.push_to_hub`]. Collective; the first process uploads.

        Raises:
            `InputError`: a file holds a token or a path of this disk; or as [`init_hf_repo`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", Path(self.args.hub_model_id or self.args.output_dir).name)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        job = self._upload(Path(self.args.output_dir), commit_message, token, revision, copy=not blocking)
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            job = self._upload(Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}")
        except InputError as error:
            logger.warning("%s", error)
            return
        jobs = [] if self.push_in_progress is None else [one for one in self.push_in_progress.jobs if not one.done()]
        self.push_in_progress = PushInProgress([*jobs, job])

    def _upload(
        self,
        folder: Path,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        copy: bool = False,
    ) -> Future:
        """Upload, in the background, what of a directory is for others; with `copy` the directory may be written to meanwhile."""
        adapter = is_peft_model(self.model)
        files = {path.relative_to(folder).as_posix(): path for path in public_files(folder, adapter)}
        for path in (folder / "adapter_config.json", Path(self.args.output_dir) / "README.md"):
            if path.is_file():
                files[path.name] = path
        hub_token = token if token is not None else self.args.hub_token
        check_files(files, folder, private.forms([self.args.output_dir, Path.cwd()]), [hub_token])
        # Apart from the run, which goes on: a checkpoint may be deleted before it is uploaded.
        aside = TemporaryDirectory(dir=self.args.output_dir, prefix="_push-")
        for name, path in files.items():
            _bring(path, Path(aside.name) / name, copy)
        revision = revision if revision is not None else self.args.hub_revision
        api = HfApi(token=hub_token, library_name="hf_delta")
        return api.run_as_future(_upload, api, self.hub_model_id, aside, message, revision)


def _upload(
    api: HfApi, repo: str, folder: TemporaryDirectory, message: str | None, revision: str | None
) -> CommitInfo:
    try:
        return api.upload_folder(repo_id=repo, folder_path=folder.name, commit_message=message, revision=revision)
    except Exception as error:
        logger.warning("A push to %s failed (%s); what is to be pushed is on disk.", repo, error)
        raise
    finally:
        folder.cleanup()


def _local_base(model: Any) -> str | None:
    """The directory of an adapter's base model, if it is one."""
    if not is_peft_model(model):
        return None
    names = [config.base_model_name_or_path for config in model.peft_config.values()]
    return next((name for name in names if name and os.path.isdir(name)), None)


def _bring(path: Path, to: Path, copy: bool) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        if copy:
            shutil.copy2(path, to)
        else:
            os.link(path.resolve(), to)
    except OSError:  # a disk without links
        shutil.copy2(path, to)
