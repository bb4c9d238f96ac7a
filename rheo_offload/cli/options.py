"""Command-line options that several verbs share."""

import argparse
from collections.abc import Callable

from rheo_offload.config import RheoConfig, packaged_names
from rheo_offload.model.loader import own_config
from rheo_offload.selection.policy import check_budget, make_selector


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and the trailing `group.key=value` overrides."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML file, or one of {', '.join(packaged_names())} (default: the model's own rheo.yaml, or default)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="group.key=value",
        help="configuration overrides, for example selection.token_budget=2048",
    )


def config_from(args: argparse.Namespace) -> RheoConfig:
    """Return the configuration that `add_config_options` parsed.

    Raises:
        ConfigError: the file, an override or a parameter of the method is refused.
    """
    own = own_config(args.model) if args.config is None and args.model else None
    config = (own or RheoConfig.from_yaml(args.config or "default")).with_overrides(args.overrides)
    # here already, so that a wrong parameter is refused before any weights are read
    selection, size = config.selection, config.cache.block_size
    selector = make_selector(selection.method, selection.params, block_size=size)
    check_budget(selector, selection.budget, selection.query_agnostic_share)
    return config


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer that is at least `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    return integer
