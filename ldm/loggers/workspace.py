"""Save the recommended panels as a view of a W&B project: ``python -m ldm.loggers.workspace``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from ldm.cli import command_parser, run_command
from ldm.io.wandb_client import Unreachable, ask

HELP = """Save the recommended panels as a view of a W&B project, over samples seen.

  python -m ldm.loggers.workspace --project ldm --entity me

It needs wandb-workspaces (pip install 'ldm[workspace]'), and 'wandb login' or WANDB_API_KEY. Each call makes
a new view. docs/comparing-runs.md says what each panel shows, and between which runs it compares."""

CURVES = {
    "Losses": ["val/loss", "val/loss_quarter_*", "train/loss"],
    "Generated images": ["val/fid/*", "val/kid/*", "val/clip_score/*"],
    "Autoencoder": [
        "val/psnr",
        "val/ssim",
        "val/lpips",
        "val/sampled_psnr",
        "val/latent_*",
        "val/dead_channels",
    ],
    "CLIP": ["val/accuracy", "val/image_to_text@*", "val/text_to_image@*", "val/zero_shot@*"],
    "Speed and data": [
        "train/images_per_second",
        "train/data_wait",
        "train/bad_samples/*",
        "val/bad_samples/*",
        "train/mfu",
        "train/memory_gib",
    ],
}
"""Names of metrics by section, a panel each; * stands for anything: a panel has all that match."""
IMAGES = ["images", "noise-levels"]
"""Image grids, a panel each."""
COLUMNS = ["run:jobType", "run:group", "summary:val/loss.min", "summary:samples"]
"""Columns of the table of runs."""


def workspace(entity: str, project: str, name: str) -> Any:
    """Make a ``wandb_workspaces.workspaces.Workspace`` of the panels.

    Args:
        entity: User or team.
        project: Project.
        name: Of the view.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    def curve(metric: str) -> Any:
        if "*" in metric:
            pattern = ".*".join(map(re.escape, metric.split("*")))
            return panels.LinePlot(title=metric, x="samples", metric_regex=f"^{pattern}$")
        return panels.LinePlot(title=metric, x="samples", y=[metric])

    sections = [
        ws.Section(name=title, panels=[curve(metric) for metric in metrics], is_open=True)
        for title, metrics in CURVES.items()
    ]
    grids: list[Any] = [panels.MediaBrowser(title=each, media_keys=[each]) for each in IMAGES]
    sections.insert(1, ws.Section(name="Images", panels=grids, is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="samples"),
        runset_settings=ws.RunsetSettings(pinned_columns=COLUMNS),
    )


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.loggers.workspace", HELP)
    parser.add_argument("--project", type=str, default="ldm", help="Project to save it in.")
    parser.add_argument("--entity", type=str | None, help="User or team; default: that of the login.")
    parser.add_argument("--name", type=str, default="ldm", help="Name of the view.")
    return parser


def save(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    options = parser().parse_args(arguments)
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "ldm.loggers.workspace needs wandb-workspaces: pip install 'ldm[workspace]'"
        ) from error

    def saved(api: Any) -> str:
        view = workspace(options.entity or api.default_entity, options.project, options.name)
        return str(view.save().url)

    try:
        url = ask(saved)
    except Unreachable as error:
        raise Unreachable(f"--project '{options.project}': {error}") from error
    except ValueError as error:
        raise ValueError(
            f"--project '{options.project}': no view was saved ({error}): check --entity and 'wandb login'"
        ) from error
    print(f"{options.name}: {sum(map(len, CURVES.values())) + len(IMAGES)} panels, {url}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 saved, 2 bad input, 75 no answer."""
    return run_command(lambda: save(arguments))


if __name__ == "__main__":
    sys.exit(main())
