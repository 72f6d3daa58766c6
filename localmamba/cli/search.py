"""`localmamba search`: searches scan directions on a data set and leaves a run folder."""

import inspect
from pathlib import Path

from localmamba.search import STRATEGIES
from localmamba.tasks.job import SearchJob


def search(
    job: SearchJob, output: Path | None = None, overwrite: bool = False, resume: bool = False
) -> None:
    """Searches the scan directions of every layer.

    Leaves a folder with directions.json (for train --directions; there from the first epoch on),
    probabilities.csv (of every layer after each epoch), supernet.safetensors (for train
    --start_from), metrics.csv, tensorboard/, metrics.json, config.yaml and two figures.

    Settings that are not given come from the recipe that belongs to the data. Strategies:

    {strategies}

    Args:
        job: Settings of the search.
        output: Folder of the run; runs/search-MODEL-DATA by default, numbered if that is taken.
        overwrite: Whether the output folder may hold files; those of the same name are replaced.
        resume: Whether to go on from the last saved step of the run in the output folder; a run
            that has saved none starts again.

    Examples:
      localmamba search --data digits --model localvim_demo_search
      localmamba search --data PHOTOS --model localvim_search --candidates h v w2 w7 w14 snake
      localmamba search --data PHOTOS --model localvmamba_tiny_search --strategy single_path
      localmamba search --data IMAGENET --config imagenet-localvim
      localmamba search --data PHOTOS --model localvim_search --devices 2 --precision bf16-mixed
      localmamba search --config runs/x/config.yaml --output runs/x --resume
    """
    from localmamba.cli.reports import make_console, print_paths
    from localmamba.cli.show import draw_search, print_choice
    from localmamba.tasks.run_folder import is_finished, open_run_folder
    from localmamba.tasks.search import Search
    from localmamba.tasks.trainer import is_main_process

    if resume and is_finished(output):
        if is_main_process():
            print(f"nothing left to do: the run in {output} has ended")
        return
    ready = Search(job)
    if not is_main_process():
        ready.run(output, resume=resume)
        return
    console = make_console()
    name = f"search-{job.model}-{Path(job.data).name}"
    with open_run_folder(output, name, overwrite, resume) as folder:
        searched = ready.run(folder, console, resume=resume)
    assert searched is not None  # this is the main process
    figures = draw_search(folder)
    print_choice(console, searched.choice)
    names = ("config.yaml", "directions.json", "probabilities.csv", "metrics.csv", "metrics.json")
    supernet = folder / "supernet.safetensors"
    paths = [*(folder / name for name in names), *([supernet] * supernet.is_file())]
    print_paths(console, [*paths, *figures])


def _describe_strategies() -> str:
    """Returns a line for each strategy, the first of its docstring."""
    lines = {name: inspect.getdoc(kind) or "" for name, kind in STRATEGIES.items()}
    return "\n".join(f"  {name}: {text.splitlines()[0]}" for name, text in lines.items())


search.__doc__ = (inspect.getdoc(search) or "").replace("{strategies}", _describe_strategies())
