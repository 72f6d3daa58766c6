"""`localmamba train`: trains a classifier on a data set and leaves a run folder."""

from pathlib import Path

from localmamba.tasks.job import TrainingJob


def train(
    job: TrainingJob, output: Path | None = None, overwrite: bool = False, resume: bool = False
) -> None:
    """Trains a classifier and evaluates it on held-out images.

    Leaves a folder with config.yaml (every setting, to be used again with --config),
    directions.json, model.safetensors (for evaluate and predict), metrics.csv (a row an epoch),
    tensorboard/, metrics.json (of the last weights on the held-out images) and the training curves.

    Settings that are not given come from the recipe that belongs to the data.

    Args:
        job: Settings of the training.
        output: Folder of the run; runs/train-MODEL-DATA by default, numbered if that is taken.
        overwrite: Whether the output folder may hold files; those of the same name are replaced.
        resume: Whether to go on from the last saved step of the run in the output folder; a run
            that has saved none starts again.

    Examples:
      localmamba train --data digits --model localvim_demo
      localmamba train --data PHOTOS --model localvim_tiny --directions runs/x/directions.json
      localmamba train --data PHOTOS --model localvmamba_tiny --epochs 50 --precision bf16-mixed
      localmamba train --data IMAGENET --config imagenet-localvim --devices 8
      localmamba train --data PHOTOS --config fine-tune --start_from local_vim_tiny.ckpt
      localmamba train --config runs/train-localvim_demo-digits/config.yaml
      localmamba train --config runs/x/config.yaml --output runs/x --resume
    """
    from localmamba.cli.reports import make_console, print_paths, print_results
    from localmamba.figures.curves import draw_curves
    from localmamba.figures.style import save_figure
    from localmamba.tasks.run_folder import is_finished, open_run_folder
    from localmamba.tasks.trainer import is_main_process
    from localmamba.tasks.training import Training

    if resume and is_finished(output):
        if is_main_process():
            print(f"nothing left to do: the run in {output} has ended")
        return
    ready = Training(job)
    if not is_main_process():
        ready.run(output, resume=resume)
        return
    console = make_console()
    name = f"train-{job.model}-{Path(job.data).name}"
    with open_run_folder(output, name, overwrite, resume) as folder:
        trained = ready.run(folder, console, resume=resume)
        assert trained is not None  # this is the main process
        saved = trained.save(folder)
    curves = draw_curves({job.model: trained.history}, trained.split)
    figures = save_figure(curves, folder / "curves")
    results = {job.model: trained.card.metrics}
    print_results(console, f"{job.data}, {trained.split} images", results)
    files = [folder / "config.yaml", folder / "metrics.csv", *saved, *figures]
    print_paths(console, files)
