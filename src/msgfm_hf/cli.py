"""`msgfm ...`: every command of the package, each with a `--help` that teaches."""

import argparse
import os
import shlex
import sys
import traceback
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
    folder = kinds.add_parser(
        "folder",
        help="folders of GeoTIFF chips, paired by name, with labels",
        description=_DESCRIPTIONS["shards folder"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _own_data(folder, "SENSOR=PATTERN[,bands=..][,unit=..][,scale=..][,offset=..][,level=..][,nodata=..], with {key}")
    folder.add_argument("--labels", help="CSV, pattern of masks with {key}, or GeoJSON/GeoPackage (default none)")
    folder.add_argument("--label-type", choices=("class", "list", "number"), help="of a CSV (default: as it looks)")
    folder.add_argument("--split-by", required=True, metavar="COLUMN|block:5km", help="column of the CSV, or blocks")
    folder.add_argument("--splits", metavar="CSV", help="where the column of --split-by is (default --labels)")
    folder.add_argument("--allow-overlap", action="store_true", help="accept footprints that overlap across splits")
    folder.add_argument("--drop-overlap", action="store_true", help="leave out val over test, train over val and test")
    folder.set_defaults(run=_shards_folder)
    scenes = kinds.add_parser(
        "scenes",
        help="large images, warped to one grid and cut into tiles",
        description=_DESCRIPTIONS["shards scenes"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _own_data(scenes, "SENSOR=FILE[,bands=..][,unit=..][,scale=..][,offset=..][,level=..][,nodata=..]")
    scenes.add_argument("--gsd", type=float, required=True, help="metres per pixel of the grid")
    scenes.add_argument("--size", type=int, default=256, help="side of a tile in pixels (default 256)")
    scenes.add_argument("--stride", type=int, help="pixels from tile to tile (default --size)")
    scenes.add_argument("--min-valid", type=float, default=0.8, help="share of valid pixels of a tile (default 0.8)")
    scenes.add_argument("--labels", help="GeoJSON or GeoPackage of points or polygons (default none)")
    scenes.add_argument("--split-by", required=True, metavar="block:100m", help="side of the blocks that are dealt")
    scenes.set_defaults(run=_shards_scenes)
    _archives(kinds)


def _own_data(parser: argparse.ArgumentParser, text: str):
    parser.add_argument("--input", action="append", required=True, help=text + "; repeat per sensor")
    parser.add_argument("--label", metavar="COLUMN", help="column or attribute of --labels")
    parser.add_argument("--shares", default="0.7,0.15,0.15", help="of train, val and test (default 0.7,0.15,0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of the deal and of the order of rows (default 0)")
    parser.add_argument("--out", required=True, help="folder of sources to write into")
    parser.add_argument("--name", help="name of the source, its folder in --out (default the sensors' ids)")
    parser.add_argument("--overwrite", action="store_true", help="replace the source if it exists")


def _archives(kinds):
    parsers = {}
    for kind, text in (
        ("geopile", "GeoPile: RGB pictures of five collections"),
        ("millionaid", "Million-AID: a million RGB pictures"),
        ("sen12ms", "SEN12MS: Sentinel-1 with Sentinel-2 L1C"),
        ("mdas", "MDAS: aerial RGB with heights, Augsburg"),
        ("ben-ge", "BigEarthNet v1 with heights: Sentinel-1, Sentinel-2 L2A, elevation"),
    ):
        parser = parsers[kind] = kinds.add_parser(
            kind,
            help=text,
            description=_DESCRIPTIONS[f"shards {kind}"] + _ARCHIVES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--root", required=True, type=Path, help="folder of the unpacked archive")
        parser.add_argument("--out", required=True, type=Path, help="folder of sources to write into")
        parser.add_argument("--workers", type=int, help="processes (default one per core)")
        parser.add_argument("--limit", type=int, help="a trial run: so many images only, of every split its share")
        parser.add_argument("--max-bad", type=int, default=100, help="stop when more images are bad (default 100)")
        parser.set_defaults(run=_shards_archive)
    parsers["geopile"].add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="a collection to leave out (resisc45); repeatable",
    )
    parsers["sen12ms"].add_argument(
        "--keep-cr-test", action="store_true", help="keep the ten scenes on which SEN12MS-CR is tested"
    )
    ben_ge = parsers["ben-ge"]
    ben_ge.add_argument("--dem", default="dem", help="folder of heights in --root (default dem)")
    for split in ("train", "val", "test"):
        ben_ge.add_argument(f"--{split}-list", type=Path, metavar="CSV", help=f"patches of {split} (default by tile)")
    ben_ge.add_argument(
        "--without", action="append", default=[], type=Path, metavar="CSV", help="patches to leave out; repeatable"
    )


def _shards_archive(arguments):
    from msgfm_hf.data.archive import convert_archive, format_conversion
    from msgfm_hf.data.ben_ge import BenGe
    from msgfm_hf.data.geopile import GeoPile
    from msgfm_hf.data.mdas import Mdas
    from msgfm_hf.data.millionaid import MillionAid
    from msgfm_hf.data.sen12ms import Sen12MS

    def ben_ge():
        lists = {split: getattr(arguments, f"{split}_list") for split in ("train", "val", "test")}
        given = {split: path for split, path in lists.items() if path is not None}
        return BenGe(arguments.root, arguments.dem, given, tuple(arguments.without))

    readers = {
        "geopile": lambda: GeoPile(arguments.root, tuple(arguments.without)),
        "millionaid": lambda: MillionAid(arguments.root),
        "sen12ms": lambda: Sen12MS(arguments.root, arguments.keep_cr_test),
        "mdas": lambda: Mdas(arguments.root),
        "ben-ge": ben_ge,
    }
    try:
        made = convert_archive(
            readers[arguments.kind](),
            arguments.out,
            workers=arguments.workers,
            limit=arguments.limit,
            max_bad=arguments.max_bad,
            command=arguments.given,
        )
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    print(format_conversion(made))
    print(f"Look at it with `msgfm inspect {made.folder}`.")


def _shards_folder(arguments):
    from msgfm_hf.data.folder import LEFT_OUT, plan_folder, write_folder
    from msgfm_hf.data.inputs import parse_inputs

    plan = plan_folder(
        parse_inputs(arguments.input),
        arguments.split_by,
        labels=arguments.labels,
        label=arguments.label,
        label_type=arguments.label_type,
        splits=arguments.splits,
        shares=arguments.shares,
        seed=arguments.seed,
        allow_overlap=arguments.allow_overlap,
        drop_overlap=arguments.drop_overlap,
    )
    print("\n".join(plan.said))
    name = arguments.name or "_".join(plan.inputs)
    counts = write_folder(plan, arguments.out, name, seed=arguments.seed, overwrite=arguments.overwrite)
    if plan.left_out:
        print(f"left out: {len(plan.left_out)} keys, all of them in {Path(arguments.out) / name / LEFT_OUT}")
    _say_own_data(arguments.out, name, counts, plan.labels)


def _shards_scenes(arguments):
    from msgfm_hf.data.inputs import parse_inputs
    from msgfm_hf.data.labels import VectorLabels
    from msgfm_hf.data.scenes import plan_scenes, write_scenes

    if (arguments.labels is None) != (arguments.label is None):
        raise ValueError(
            "`label` must be given with `labels`, the shapes it is an attribute of, "
            f"got {arguments.label!r} with {arguments.labels!r}. Give both or neither."
        )
    plan = plan_scenes(
        parse_inputs(arguments.input),
        arguments.gsd,
        arguments.split_by,
        size=arguments.size,
        stride=arguments.stride,
        shares=arguments.shares,
        seed=arguments.seed,
    )
    labels = VectorLabels(arguments.labels, arguments.label) if arguments.labels else None
    print("\n".join(plan.said + (labels.said if labels else [])))
    name = arguments.name or "_".join(plan.inputs)
    counts, said = write_scenes(plan, arguments.out, name, arguments.min_valid, labels, overwrite=arguments.overwrite)
    print("\n".join(said))
    _say_own_data(arguments.out, name, counts, labels)


def _say_own_data(out, name, counts, labels):
    from msgfm_hf.data.splits import describe_counts

    source = shlex.quote(str(Path(out) / name))
    lines = describe_counts(counts, labels.kind, labels.classes) if labels else describe_counts(counts)
    print("\n".join(["", f"{source}:", *(f"  {line}" for line in lines)]))
    print(f"\nNext: msgfm inspect {source}\n      msgfm pretrain --data {source} --name {name}")


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


def _sensors(parser: argparse.ArgumentParser):
    parser.add_argument("sensor", nargs="*", help="ids of sensors (default all)")
    parser.set_defaults(run=_run_sensors)


def _run_sensors(arguments):
    from msgfm_hf.data.inspect import describe_sensors

    print(describe_sensors(arguments.sensor))


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


def _reconstruct(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="folder of a pretrained model, of a run or of a checkpoint")
    parser.add_argument(
        "--input",
        action="append",
        metavar="SENSOR=PATH[,..]",
        help="a GeoTIFF of one sensor, with what it does not say itself: bands=B02+B03, unit=, scale=, offset=, "
        "level=, nodata=; repeat for several sensors on one pixel grid",
    )
    parser.add_argument("--shards", metavar="DIR", help="instead of files: a folder of shards, or of such folders")
    parser.add_argument("--split", default="val", help="split of the shards (default val)")
    parser.add_argument("--rows", type=int, default=1, help="so many rows of each source, evenly spread (default 1)")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="share of masked cells (default 0.6)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other masks (default 0)")
    parser.add_argument(
        "--size", type=int, default=1024, help="centred window taken of larger images, in pixels (default 1024)"
    )
    parser.add_argument(
        "--region",
        choices=("masked", "all"),
        help="where crossings are shown and counted (default: as in the model's training, else masked)",
    )
    parser.add_argument("--out", default="reconstruction", help="folder to write into (default reconstruction)")
    parser.set_defaults(run=_run_reconstruct)


def _run_reconstruct(arguments):
    from msgfm_hf.train.reconstruct import format_reconstruction, reconstruct

    report = reconstruct(
        arguments.model,
        arguments.out,
        inputs=arguments.input,
        shards=arguments.shards,
        split=arguments.split,
        rows=arguments.rows,
        mask_ratio=arguments.mask_ratio,
        seed=arguments.seed,
        size=arguments.size,
        region=arguments.region,
        command=arguments.given,
    )
    print(format_reconstruction(report))
    print(f"\nWritten: {Path(arguments.out) / 'reconstruction.json'}, and beside it the pictures and GeoTIFFs")


def _report(parser: argparse.ArgumentParser):
    parser.add_argument("model", metavar="RUN", help="folder of a run, of a checkpoint, or of any saved model")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="where to write: the page (default RUN/report.html), or the folder of --experts (default RUN/experts)",
    )
    parser.add_argument("--experts", action="store_true", help="instead of the page: whose tokens each expert takes")
    parser.add_argument(
        "--data",
        action="append",
        help="with --experts: folder of shards, or of such folders; repeatable (default those of the run)",
    )
    parser.add_argument("--split", help="with --experts: split whose crops are looked at (default val)")
    parser.add_argument(
        "--max_crops", type=int, help="with --experts: at most this many crops per source (default all)"
    )
    parser.add_argument(
        "--prune",
        nargs="+",
        metavar="SENSOR",
        help="with --experts, after RUN: also write PATH/dense, a model without experts for these sensors",
    )
    parser.set_defaults(run=_run_report)


def _run_report(arguments):
    if not arguments.experts:
        return _run_report_page(arguments)
    from msgfm_hf.train.experts import format_experts, report_experts

    out = Path(arguments.out or Path(arguments.model) / "experts")
    report = report_experts(
        arguments.model,
        arguments.data,
        out,
        arguments.split or "val",
        max_crops=arguments.max_crops,
        prune=arguments.prune,
        command=arguments.given,
    )
    print(format_experts(report))
    print(f"\nWritten: {out / 'experts.json'}  {out / 'experts.png'}  {out / 'crops.png'}")
    if arguments.prune:
        print(f"Dense model: {out / 'dense'}")


def _run_report_page(arguments):
    from msgfm_hf.train.report import report_run

    for name in ("data", "split", "max_crops", "prune"):
        value = getattr(arguments, name)
        if value is not None:
            raise ValueError(
                f"`--{name}` must come with `--experts`, got {value!r} without. Add it, or leave this out."
            )
    report = report_run(arguments.model, arguments.out)
    print(report["state"])
    print(report["best"])
    for warning in report["warnings"]:
        print(f"  ! {warning}")
    print(f"\nWritten: {report['page']}")


def _convert(parser: argparse.ArgumentParser):
    parser.add_argument(
        "source", nargs="+", metavar="SRC", help="file or folder; or a .master file and its .rank* files"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist, or be empty")
    parser.add_argument("--layout", default="auto", help="what wrote the source, to be sure (default auto; see above)")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels, asked for where the source does not tell")
    parser.add_argument("--sensor", default="rgb", help="sensor of the channels, known or new (default rgb)")
    parser.add_argument(
        "--bands",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="B,B,...",
        help="names of the source's channels, in its order (default all bands of the sensor)",
    )
    parser.add_argument("--num-experts", type=int, metavar="N", help="copy the MLPs of the paper's blocks into experts")
    parser.add_argument(
        "--window-size", type=int, metavar="N", help="tokens, for other windows, or where the source does not tell"
    )
    parser.set_defaults(run=_run_convert)


def _run_convert(arguments):
    from msgfm_hf.convert.checkpoint import REPORT, convert_checkpoint, format_conversion

    report = convert_checkpoint(
        arguments.source,
        arguments.out,
        layout=arguments.layout,
        image_size=arguments.image_size,
        sensor=arguments.sensor,
        bands=arguments.bands,
        num_experts=arguments.num_experts,
        window_size=arguments.window_size,
        command=arguments.given,
    )
    print(format_conversion(report))
    print(f"\nWritten: {arguments.out}, with every tensor's story in {Path(arguments.out) / REPORT}")
    print(f"Load it: {report['model_class']}.from_pretrained({arguments.out!r})")


def _push(parser: argparse.ArgumentParser):
    parser.add_argument("folder", metavar="DIR", help="folder of a checkpoint, or of shards")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub; made where there is none")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and push nothing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to, made where there is none (default main)"
    )
    parser.add_argument("--card", metavar="YAML", help="what you state on the card (default DIR/card.yaml)")
    parser.set_defaults(run=_run_push)


def _run_push(arguments):
    from msgfm_hf.hub.push import push_to_hub

    push_to_hub(
        arguments.folder,
        arguments.repo_id,
        dry_run=arguments.dry_run,
        private=arguments.private,
        revision=arguments.revision,
        card=arguments.card,
    )


# What only one command needs is imported inside it: `msgfm inspect` has no use for accelerate.
_COMMANDS = {
    "shards": ("make shards, the training format, out of imagery", _shards),
    "sensors": ("the sensors that are known: bands and their other names, units, levels", _sensors),
    "inspect": ("say and show what is in shards", _inspect),
    "evaluate": ("masked reconstruction and crossings on held-out places, beside baselines", _evaluate),
    "reconstruct": ("mask an image, predict it from itself and from its partners, and see", _reconstruct),
    "report": ("a page about a run, or what the experts of a model take", _report),
    "convert": ("weights of SimMIM, GFM, Swin, SwinV2, Swin-MoE, Satlas or Transformers' Swin", _convert),
    "push": ("publish a checkpoint or shards on the Hub, with code, card and handler", _push),
}
_ARCHIVES = (
    "\n\nUses all cores and little memory. A command that was stopped, even killed, goes on when it is given again; a\n"
    "finished one writes nothing. Missing, damaged and mismatched images are left out, counted and listed.\n"
    "manifest.json beside the shards has the counts, checksums, and statistics of every band."
)
_DESCRIPTIONS = {
    "shards": "Shards are folders of Parquet files, one per source; paired sensors share a row.\n\n"
    "  msgfm shards folder --help                  your own chips: folders of GeoTIFFs\n"
    "  msgfm shards scenes --help                  your own large images\n"
    "  msgfm shards sen12ms --help                 an archive of the paper; also geopile, millionaid, mdas, ben-ge\n"
    "  msgfm shards sample --out shards            the real samples, from MSGFM_SAMPLE_DATA\n"
    "  msgfm shards synthetic --out shards         scenes to try things on",
    "shards geopile": "GeoPileV0/<collection>/<class>/<picture>, as 8-bit RGB. Validation is 1 % of the pictures by a\n"
    "hash of their path: no places are known, so a place may be on both sides. RESISC45 is one of the collections,\n"
    "and no clean downstream set for a model that saw it; leave it out to evaluate on it.\n\n"
    "  msgfm shards geopile --root GeoPileV0 --out shards --without resisc45",
    "shards millionaid": "train/<l1>/<l2>[/<l3>]/<picture>.jpg and test/..., as 8-bit RGB of at most 1024 pixels on a\n"
    "side. Both parts train, as no labels are needed, but for 1 % of the pictures that validate, by a hash of their\n"
    "path: no places are known. The licence (CC BY-NC-ND, according to its Hub card) is not an open one.\n\n"
    "  msgfm shards millionaid --root Million-AID --out shards --limit 2000",
    "shards sen12ms": "ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif with s2_1/... beside it. The 26 hold-out\n"
    "scenes of the authors are test, 5 % of the others val. Left out: one patch that is known to be damaged, and the\n"
    "ten scenes on which SEN12MS-CR tests cloud removal. No offset: the products are older than baseline 04.00.\n\n"
    "  msgfm shards sen12ms --root SEN12MS --out shards",
    "shards mdas": "Augsburg_data_4_publication/{entire_city,sub_area_1,...}/3K_RGB*.tif and 3K_DSM*.tif, cut into\n"
    "tiles of 384 pixels on the grid of the RGB (0.2 m). sub_area_1 is test, sub_area_2 val, the city train without\n"
    "the tiles that touch them.\n\n"
    "  msgfm shards mdas --root Augsburg_data_4_publication --out shards",
    "shards ben-ge": "BigEarthNet-v1.0/<patch>/ (sentinel-2 in ben-ge-8k), BigEarthNet-S1-v1.0/<patch>/ (sentinel-1)\n"
    "and <patch>_dem.tif in --dem, on the grid of 10 m; labels are the names of the 19 classes. 10 % of the tiles are\n"
    "val, 10 % test. The lists that come with ben-ge deal patches at random, so that a tile is in all splits.\n\n"
    "  msgfm shards ben-ge --root ben-ge-8k --out shards\n"
    "  msgfm shards ben-ge --root ben-ge --out shards --without patches_with_cloud_and_shadow.csv \\\n"
    "    --train-list train.csv --val-list val.csv --test-list test.csv",
    "shards folder": "One row per key, the text in place of {key} in the path of each sensor's file. {key} is part\n"
    "of a name; **/{key} takes the folders below into the key. The files of a row share one pixel grid.\n\n"
    "Labels are a column of a CSV (a class, a list joined by ; or |, or a number) that has the keys in a column `key`\n"
    "or another; masks of class ids; or points and polygons with a class, drawn on the grid of each chip. 255 is\n"
    "unlabelled.\n\n"
    "Splits go by place. --split-by COLUMN is the split where its values are train, val and test, and groups\n"
    "otherwise; block:5km makes groups of squares. Whole groups are dealt to splits. Footprints that overlap across\n"
    "splits are an error; chips cut with a regular overlap need --drop-overlap.\n\n"
    "  msgfm shards folder --input s1='chips/s1/{key}.tif' \\\n"
    "    --input s2='chips/s2/{key}.tif,level=l2a,offset=-1000' \\\n"
    "    --labels chips.csv --label crop --split-by region --out shards --name fields\n"
    "  msgfm shards folder --input rgb='tiles/**/{key}_rgb.tif' --labels 'tiles/**/{key}_mask.tif' \\\n"
    "    --split-by block:5km --out shards",
    "shards scenes": "Warps all inputs to one grid, coordinate system and origin of the first, and cuts tiles out of\n"
    "what all cover: bilinear, or the average where several pixels fall into one; decibels as linear power. Alpha,\n"
    "masks and nodata are invalid pixels. Whole blocks of tiles are dealt to splits. Memory is bounded by a row of\n"
    "tiles; while it runs, --out needs room for the shards twice, and for decibels as float32.\n\n"
    "  msgfm shards scenes --input rgb=ortho.tif --input dsm=dsm.tif,unit=metres --gsd 0.10 --size 256 \\\n"
    "    --split-by block:100m --out shards --name village\n"
    "  msgfm shards scenes --input s2=scene.tif,level=l2a,offset=-1000 --gsd 10 --split-by block:10km \\\n"
    "    --labels fields.gpkg --label crop --out shards",
    "sensors": "What can stand before the = of --input SENSOR=..., and what unit=, level= and bands= can be.\n\n"
    "  msgfm sensors                               all of them\n"
    "  msgfm sensors s2                            the bands of Sentinel-2",
    "inspect": "Counts, places, bands, units, sizes, dates and values of shards, and a picture of some rows.\n\n"
    "  msgfm inspect shards                        every source in the folder\n"
    "  msgfm inspect shards/terramesh --verify     read and check every byte; fails if something is damaged",
    "evaluate": "Masked L1 of every sensor from itself and from its partner, in standard deviations (15 m for\n"
    "elevation; lower is better), on crops of places that did not train. Beside it: the band mean and median of the\n"
    "training places, the mean of the image's visible pixels, inpainting from them, and a pixelwise regression from\n"
    "the partner. Several models are seeds of one recipe: their median and range are shown.\n\n"
    "  msgfm evaluate --model runs/sample --data runs/data/sample\n"
    "  msgfm evaluate --model runs/a --model runs/b --data shards --out results/mine.json",
    "reconstruct": "Figures 3 and 5 of the paper for your images: masks each sensor, predicts it from itself and from\n"
    "every other sensor given, and what the model can predict besides (without errors, for want of an image).\n"
    "Writes reconstruction.png, one GeoTIFF per direction in reflectance, dB or metres (s1_to_s2.tif) on the grid of\n"
    "the input, and reconstruction.json. For shards there is a folder of these per row.\n\n"
    "A sensor's own reconstruction has the input where it was visible: only masked pixels are trained, and only they\n"
    "count. A crossing is shown and counted under the mask of its input too, or everywhere (--region all) where the\n"
    "model was trained so. Images larger than --size are looked at in a centred window, whole in memory; cut another\n"
    "with `gdal_translate -srcwin`. Grids that differ are put on one with gdalwarp, or by `msgfm shards scenes`.\n\n"
    "Radar, in a table and in sar_statistics.png: statistics of the same pixels before and after, and the speckle\n"
    "suppression index, SSI = (std / mean after) / (std / mean before) of linear power, per band. The paper reads an\n"
    "index close to 1 as statistics that are kept. Below 1 the reconstruction is smoother than the image, as it must\n"
    "be where speckle cannot be predicted; the index does not say whether pixels are right, the error does.\n\n"
    "  msgfm reconstruct --model runs/sample --input s1=s1.tif --input s2=s2.tif,offset=-1000,level=l2a\n"
    "  msgfm reconstruct --model runs/sample --input s1=s1.tif --out s2-from-s1       Sentinel-2 from radar alone\n"
    "  msgfm reconstruct --model runs/sample --shards runs/data/sample --rows 4 --seed 1",
    "push": "Publishes a checkpoint, or a folder of shards, as one commit: all of it or nothing.\n\n"
    "A checkpoint goes with its processor, the code of the model (every Auto class and pipeline then loads with\n"
    "trust_remote_code=True), a card, handler.py and requirements.txt for hosted inference, and example images.\n"
    "Shards go with a card that lets load_dataset stream them.\n\n"
    "What only you know stands in DIR/card.yaml, or in the file of --card: name, summary, license (license_name and\n"
    "license_link for `other`), base_model, tags, datasets, gsd ({sensor: text}), training_data (name, license, url,\n"
    "note), intended_use, limits, beware, and results: entries of task, dataset, split, metric, value, n, seed,\n"
    "commit, command, origin (run, or copied with its source), and dataset_id and task_id of a benchmark of the Hub;\n"
    "or names of reports of `msgfm evaluate --out`. A number without what made it stops the command.\n\n"
    "The README.md there is replaced; files that are not of this command stay. docs/publishing.md says more.\n\n"
    "  hf auth login                                          once, with a token that may write\n"
    "  msgfm push runs/mine me/my-msgfm --dry-run             what would be pushed\n"
    "  msgfm push runs/mine me/my-msgfm --private\n"
    "  msgfm push shards me/my-shards                         load_dataset(..., streaming=True) reads it",
    "convert": "Turns the weights of another program into a folder that from_pretrained loads, with its processor:\n"
    "MsGFMForPreTraining where the source has a decoder, MsGFMForImageClassification where it has a classifier,\n"
    "else MsGFMModel. Features are those of the original. What became of each tensor is printed, and written to\n"
    "conversion_report.json; a tensor that nobody can explain stops the conversion. Nothing in a file is run.\n\n"
    "Layouts: simmim, gfm, swin, swinv2, swin_moe, hf_swin (a folder of Transformers), satlas (torchvision too).\n"
    "conversion_scripts/README.md has the command for each public checkpoint.\n\n"
    "  msgfm convert simmim_pretrain__swin_base__img192_window6__800ep.pth --out models/simmim\n"
    "  msgfm convert model.pth.master model.pth.rank* --out models/swin-moe\n"
    "  msgfm convert sentinel1_swinb_si.pth --sensor s1 --bands VH,VV --image-size 512 --out models/satlas-s1\n"
    "  msgfm convert four_channels.pth --sensor skysat --bands blue,green,red,nir --out models/skysat\n"
    "  msgfm convert gfm.pth --num-experts 8 --out models/gfm-8      experts for pretraining, copies of the MLPs",
    "report": "Writes one HTML page about a run, finished or not: how far it is, what to look at, losses, validation,\n"
    "learning rate, throughput, where the tokens of each sensor go, reconstructions over time, and what made it. The\n"
    "page holds everything it shows: open it anywhere, or send it.\n\n"
    "  msgfm report runs/sample                              writes runs/sample/report.html\n\n"
    "--experts: where the tokens of each sensor go, block by block: the share that each expert takes, its entropy,\n"
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
        # Ends the line of a progress bar that is still open: the frames of the error hold it.
        traceback.clear_frames(error.__traceback__)
        parser.exit(1, f"msgfm {arguments.command}: {error}\n")


if __name__ == "__main__":
    main()
