"""The Kconfig commands behind make: menuconfig, defconfig, olddefconfig, savedefconfig and lint.

Kconfiglib's own tools only warn of a mistake; these stop at it. They start from ``lib.kconfig``.
"""

import argparse
import difflib
import locale
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.commands.cli import run_main
from lib.config import build_config, load_config
from lib.errors import InputError
from lib.files import check_writable
from lib.kconfig import (
    ROOT,
    Assignment,
    Symbols,
    check_effective,
    load_assignments,
    open_kconfig,
)

DEFCONFIGS = ROOT / "defconfigs"
HEADER = "# Tierhints configuration; change it with make menuconfig\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "menuconfig":
        edit_config(args.config)
    elif args.command == "defconfig":
        write_defconfig(args.name, args.config)
    elif args.command == "olddefconfig":
        update_config(args.config)
    elif args.command == "savedefconfig":
        save_minimal(args.config, args.output)
    else:
        return lint()
    return 0


def edit_config(path: Path) -> None:
    """Open kconfiglib's menu on a configuration, and check what it saved."""
    import curses

    import menuconfig

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError("menuconfig needs a terminal; without one, use make <preset>_defconfig")
    check_writable(path)
    kconf = open_kconfig()
    if path.exists():
        check_effective(kconf, load_assignments(kconf, path))
    kconf.config_header = HEADER
    os.environ["KCONFIG_CONFIG"] = str(path)
    use_installed_locale()
    try:
        menuconfig.menuconfig(kconf)
    except curses.error as error:
        raise InputError(
            f"menuconfig can't use the terminal {os.environ.get('TERM')!r} ({error}): set TERM to "
            f"one that is installed, for example xterm"
        ) from error
    if path.exists():
        load_config(path)


def use_installed_locale() -> None:
    """Replace a locale of the environment that isn't installed: kconfiglib stops at one."""
    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        names = [name for name in os.environ if name == "LANG" or name.startswith("LC_")]
        asked = " ".join(f"{name}={os.environ.pop(name)}" for name in sorted(names))
        os.environ["LC_ALL"] = "C.UTF-8"
        try:
            locale.setlocale(locale.LC_ALL, "")
        except locale.Error:
            os.environ["LC_ALL"] = "C"
        print(
            f"{asked}: a locale that isn't installed, {os.environ['LC_ALL']} is used instead",
            file=sys.stderr,
        )


def write_defconfig(name: str, path: Path) -> None:
    """Write the configuration of a preset, with fragments after it: ``base+fragment+fragment``."""
    check_writable(path)
    kconf = open_kconfig()
    symbols = merge_defconfigs(kconf, [find_defconfig(part) for part in name.split("+")])
    build_config(symbols)
    print(kconf.write_config(str(path), header=f"{HEADER}# From {name}\n"))


def merge_defconfigs(kconf: Any, paths: Sequence[Path]) -> Symbols:
    """Load presets one over the other; a line must take effect unless a later one overrides it."""
    requested: dict[str, Assignment] = {}
    for path in paths:
        for name, assignment in load_assignments(kconf, path, replace=False).items():
            choice = kconf.syms[name].choice
            if choice and assignment.value == "y":
                for member in choice.syms:
                    requested.pop(member.name, None)
            requested[name] = assignment
    check_effective(kconf, requested)
    return Symbols(kconf, "+".join(path.name for path in paths), requested)


def find_defconfig(name: str) -> Path:
    names = sorted(path.name for path in DEFCONFIGS.iterdir())
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"no preset {name!r}{hint} (there are {', '.join(names)})")
    return DEFCONFIGS / name


def update_config(path: Path) -> None:
    """Rewrite a configuration for the Kconfig files of now, saying on stderr what is dropped."""
    if not path.is_file():
        raise InputError(f"no configuration {path}: run make <preset>_defconfig or make menuconfig")
    check_writable(path)
    kconf = open_kconfig()
    kconf.load_config(str(path))
    dropped = [warning.replace("warning: ", "") for warning in kconf.warnings]
    for symbol in kconf.unique_defined_syms:
        wanted, value = symbol.user_value, symbol.str_value
        wanted = {0: "n", 2: "y"}.get(wanted, wanted)
        if wanted not in (None, value):
            dropped.append(f"{path}: CONFIG_{symbol.name}={wanted} had no effect")
    for line in dropped:
        print(f"dropped: {line}", file=sys.stderr)
    print(kconf.write_config(str(path), header=HEADER))
    load_config(path)


def save_minimal(path: Path, output: Path) -> None:
    """Write the lines of a configuration that differ from the defaults: a preset."""
    check_writable(output)
    kconf = open_kconfig()
    check_effective(kconf, load_assignments(kconf, path))
    print(kconf.write_min_config(str(output), header="# Say here in one line what it is for\n"))


def lint() -> int:
    """Check the Kconfig files and the presets; print each finding, and return 1 if there is one."""
    os.environ["KCONFIG_WARN_UNDEF"] = "y"
    kconf = open_kconfig()
    presets = sorted(DEFCONFIGS.iterdir())
    findings = [*_lint_layout(kconf), *_lint_symbols(kconf)]
    for preset in presets:
        findings += _lint_preset(preset)
    for finding in findings:
        print(finding)
    print(
        f"kconfig lint: {len(kconf.unique_defined_syms)} symbols, {len(presets)} presets, "
        f"{len(findings)} findings"
    )
    return 1 if findings else 0


def _lint_layout(kconf: Any) -> Iterator[str]:
    for name in kconf.kconfig_filenames:
        for number, line in enumerate(Path(name).read_text().splitlines(), 1):
            if not re.fullmatch(r"(|\t(  )?)(\S|\S.*\S)|", line):
                yield f"{name}:{number}: indent with one tab, help text with a tab and two spaces"
            if len(line.expandtabs(8)) > 100:
                yield f"{name}:{number}: longer than 100 columns"


def _lint_symbols(kconf: Any) -> Iterator[str]:
    import kconfiglib

    symbols = Symbols(kconf, "Kconfig", {})
    build_config(symbols)
    for symbol in kconf.unique_defined_syms:
        where = f"{symbol.nodes[0].filename}:{symbol.nodes[0].linenr}: {symbol.name}"
        if not any(node.help for node in symbol.nodes):
            yield f"{where} has no help"
        if symbol.orig_type == kconfiglib.INT and not (symbol.orig_ranges and symbol.orig_defaults):
            yield f"{where} is an int without a range or a default"
        if symbol.name not in symbols.read:
            yield f"{where} is read by nothing: read it in lib/config/__init__.py, or remove it"


def _lint_preset(path: Path) -> Iterator[str]:
    lines = path.read_text().splitlines()
    if not re.match(r"# (?!CONFIG_)\S", lines[0] if lines else ""):
        yield f"{path}: the first line must be a comment that says what it is for"
    kconf = open_kconfig()
    try:
        symbols = merge_defconfigs(kconf, [path])
        build_config(symbols)
    except InputError as error:
        yield str(error)
        return
    if lines[0].startswith("# Fragment: "):
        return  # overrides what another preset says, also with a default
    minimal = kconf._min_config_contents("").splitlines()
    own = [line for line in lines if re.match(r"(# )?CONFIG_", line)]
    if own != minimal:
        changes = difflib.unified_diff(own, minimal, lineterm="", n=0)
        changed = [line for line in changes if re.match(r"[+-][^+-]", line)]
        yield f"{path}: not as make savedefconfig writes it: {', '.join(changed)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(".config"),
        metavar="FILE",
        help="configuration to read or write (default: %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("menuconfig", help="change the configuration in a menu")
    defconfig = commands.add_parser("defconfig", help="load a preset")
    defconfig.add_argument("name", help="a file of defconfigs/, or several as base+fragment")
    commands.add_parser("olddefconfig", help="bring an old configuration up to date")
    save = commands.add_parser("savedefconfig", help="write the lines that differ from defaults")
    save.add_argument(
        "--output", type=Path, default=Path("defconfig"), help="where (default: %(default)s)"
    )
    commands.add_parser("lint", help="check the Kconfig files and the presets")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
