"""`msgfm ...`: every command of the package, each with a `--help` that teaches."""

import argparse
import os
import shlex
import sys
from pathlib import Path


def _shards(parser: argparse.ArgumentParser):
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    sample = kinds.add_parser(
        "sample", help="the small real imagery of MSGFM_SAMPLE_DATA", description=_shards_sample.__doc__
    )
    sample.add_argument(
        "--root", default=os.environ.get("MSGFM_SAMPLE_DATA"), help="its folder (default MSGFM_SAMPLE_DATA)"
    )
    sample.add_argument("--out", required=True, help="folder to make; one folder per source inside")
    sample.add_argument("--overwrite", action="store_true", help="make sources anew that are there already")
    sample.set_defaults(run=_shards_sample)
    synthetic = kinds.add_parser("synthetic", help="seeded synthetic scenes", description=_shards_synthetic.__doc__)
    synthetic.add_argument("--out", required=True, help="folder to make; one folder per source inside")
    synthetic.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default 0)")
    synthetic.add_argument("--overwrite", action="store_true", help="make sources anew that are there already")
    synthetic.set_defaults(run=_shards_synthetic)


def _shards_sample(arguments):
    """Turn the real samples into shards, with the split by place that their splits.csv gives."""
    from msgfm_hf.data.sample import make_sample_shards

    if not arguments.root:
        raise ValueError(
            "`--root` must be the folder of real samples, got none. Set MSGFM_SAMPLE_DATA or give `--root`."
        )
    summary = make_sample_shards(Path(arguments.root), Path(arguments.out), overwrite=arguments.overwrite)
    for source, made in summary.items():
        rows = ", ".join(f"{split} {count}" for split, count in made["rows"].items())
        print(f"{source:<12} {rows}" + ("   (kept as it was)" if made["kept"] else ""))
        for dropped in made["dropped"]:
            print(f"{'':<12} left out: {dropped}")
    print(f"Look at them with `msgfm inspect {arguments.out}`.")


def _shards_synthetic(arguments):
    """Make synthetic scenes of four sensors: unpaired RGB, Sentinel-1 with -2, and RGB with elevation, 240 images of
    each. They show that things work; they are never a result."""
    from msgfm_hf.data.synthetic import make_synthetic_shards

    made = make_synthetic_shards(Path(arguments.out), seed=arguments.seed, overwrite=arguments.overwrite)
    for source, rows in made.items():
        print(f"{source:<18} {', '.join(f'{split} {count}' for split, count in rows.items())}")
    print(f"Look at them with `msgfm inspect {arguments.out}`.")


def _inspect(parser: argparse.ArgumentParser):
    parser.add_argument("path", help="folder of a source, or of several")
    parser.add_argument("--verify", action="store_true", help="read every page and check its checksum")
    parser.add_argument(
        "--contact-sheet", metavar="PNG", help="where to draw samples of every sensor (default PATH/contact_sheet.png)"
    )
    parser.add_argument("--no-contact-sheet", action="store_true", help="print only")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(arguments):
    from msgfm_hf.data.inspect import contact_sheet, inspect_shards

    report = inspect_shards(arguments.path, verify=arguments.verify)
    print(report)
    if report.damaged:
        raise ValueError(
            f"`path` must hold sound shards, got {len(report.damaged)} damaged places. Fetch or make these files again."
        )
    if not arguments.no_contact_sheet:
        # Shards may lie where no picture can be written (hf://...).
        folder = Path.cwd() if "://" in arguments.path else Path(arguments.path)
        picture = arguments.contact_sheet or folder / "contact_sheet.png"
        print(f"\nContact sheet: {contact_sheet(arguments.path, picture)}")


def _evaluate(parser: argparse.ArgumentParser):
    parser.add_argument("--model", action="append", required=True, help="folder of a model; repeat for several seeds")
    parser.add_argument(
        "--data", action="append", required=True, help="folder of shards, or of such folders; repeatable"
    )
    parser.add_argument("--split", default="val", help="split to evaluate on (default val)")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="share of masked cells (default 0.6)")
    parser.add_argument("--mask_seeds", type=int, default=8, help="how often each crop is masked anew (default 8)")
    parser.add_argument("--max_crops", type=int, help="at most this many crops per source (default all)")
    parser.add_argument("--out", help="also write the report as JSON, by place and with what made it")
    parser.add_argument("--picture", metavar="PNG", help="also draw the first model's median and worst crops")
    parser.set_defaults(run=_run_evaluate)


def _run_evaluate(arguments):
    from msgfm_hf.train.evaluate import draw_model, evaluate_models, format_report, write_report

    report = evaluate_models(
        arguments.model,
        arguments.data,
        arguments.split,
        arguments.mask_ratio,
        mask_seeds=arguments.mask_seeds,
        max_crops=arguments.max_crops,
        command=arguments.given,
    )
    print(format_report(report))
    if arguments.out:
        write_report(report, Path(arguments.out))
        print(f"\nWritten: {arguments.out}")
    if arguments.picture:
        first = arguments.model[0]
        print(
            f"\nPicture: {draw_model(first, arguments.data, arguments.picture, arguments.split, arguments.mask_ratio)}"
        )


def _report(parser: argparse.ArgumentParser):
    parser.add_argument("model", metavar="RUN", help="folder of a run, of a checkpoint, or of any saved model")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--experts", action="store_true", help="whose tokens each expert takes")
    parser.add_argument(
        "--data", action="append", help="folder of shards, or of such folders; repeatable (default those of the run)"
    )
    parser.add_argument("--split", default="val", help="split whose crops are looked at (default val)")
    parser.add_argument("--max_crops", type=int, help="at most this many crops per source (default all)")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default RUN/experts)")
    parser.add_argument(
        "--prune",
        nargs="+",
        metavar="SENSOR",
        help="(after RUN) also write FOLDER/dense, a model without experts for these sensors",
    )
    parser.set_defaults(run=_run_report)


def _run_report(arguments):
    from msgfm_hf.train.experts import format_experts, report_experts

    out = Path(arguments.out or Path(arguments.model) / "experts")
    report = report_experts(
        arguments.model,
        arguments.data,
        out,
        arguments.split,
        max_crops=arguments.max_crops,
        prune=arguments.prune,
        command=arguments.given,
    )
    print(format_experts(report))
    print(f"\nWritten: {out / 'experts.json'}  {out / 'experts.png'}  {out / 'crops.png'}")
    if arguments.prune:
        print(f"Dense model: {out / 'dense'}")


# What only one command needs is imported inside it: `msgfm inspect` has no use for accelerate.
_COMMANDS = {
    "shards": ("make shards, the training format, out of imagery", _shards),
    "inspect": ("say and show what is in shards", _inspect),
    "evaluate": ("masked reconstruction and crossings on held-out places, beside baselines", _evaluate),
    "report": ("what the experts of a model take, and a dense model of some of them", _report),
}
_DESCRIPTIONS = {
    "shards": "Shards are folders of Parquet files, one per source; paired sensors share a row.\n\n"
    "  msgfm shards sample --out shards            the real samples, from MSGFM_SAMPLE_DATA\n"
    "  msgfm shards synthetic --out shards         scenes to try things on",
    "inspect": "Counts, places, bands, units, sizes, dates and values of shards, and a picture of some rows.\n\n"
    "  msgfm inspect shards                        every source in the folder\n"
    "  msgfm inspect shards/terramesh --verify     read and check every byte; fails if something is damaged",
    "evaluate": "Masked L1 of every sensor from itself and from its partner, in standard deviations (15 m for\n"
    "elevation; lower is better), on crops of places that did not train. Beside it: the band mean and median of the\n"
    "training places, the mean of the image's visible pixels, inpainting from them, and a pixelwise regression from\n"
    "the partner. Several models are seeds of one recipe: their median and range are shown.\n\n"
    "  msgfm evaluate --model runs/sample --data runs/data/sample\n"
    "  msgfm evaluate --model runs/a --model runs/b --data shards --out results/mine.json",
    "report": "Where the tokens of each sensor go, block by block: the share that each expert takes, its entropy,\n"
    "what the sensor tells of the expert (mutual information, in bits, all sensors weighing the same), and the crops\n"
    "each expert takes most of. Writes experts.json, experts.png (sensor x expert) and crops.png (of the block where\n"
    "the sensor tells most). Nothing is masked; tokens without a valid pixel do not count.\n\n"
    "--prune makes a dense model: in each block the expert that the given sensors use most, in training, becomes the\n"
    "MLP, multiplied by its mean gate. It says what that costs on the split, beside leaving these MLPs out.\n\n"
    "  msgfm report runs/sample --experts                    on the validation split of the run's own data\n"
    "  msgfm report runs/sample --experts --prune s1 s2      and a dense model for Sentinel-1 and -2\n"
    "  msgfm report my-model --experts --data shards --split test --out results/experts",
}


def main(argv: list[str] | None = None):
    """The entry point of `msgfm`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["pretrain"]:
        from msgfm_hf.train.pretrain import main as pretrain

        return pretrain(argv[1:])
    parser = argparse.ArgumentParser(
        prog="msgfm",
        description="msGFM, a multisensor geospatial foundation model, on the command line.",
        epilog="examples:\n"
        "  msgfm shards sample --out shards            real samples -> shards (MSGFM_SAMPLE_DATA)\n"
        "  msgfm inspect shards/terramesh              what is in them, with a contact sheet\n"
        "  msgfm pretrain --data shards --name mine --max_steps 500\n"
        "  msgfm evaluate --model runs/mine --data shards\n"
        "  msgfm report runs/mine --experts            which expert takes whose tokens",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, build) in _COMMANDS.items():
        build(
            commands.add_parser(
                name,
                help=text,
                description=_DESCRIPTIONS[name],
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    commands.add_parser("pretrain", help="pretrain on a mixture of sensors (same as pretrain.py)", add_help=False)
    arguments = parser.parse_args(argv)
    arguments.given = shlex.join(["msgfm", *argv])
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        parser.exit(1, f"msgfm {arguments.command}: {error}\n")


if __name__ == "__main__":
    main()
