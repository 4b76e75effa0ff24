"""What command lines and configuration files have in common: optional flags, values of the right type, devices."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
import yaml

from .errors import UserError

__all__ = ["OptionalFloat", "OptionalInt", "OptionalStr", "check_device", "check_part", "coerce", "flag", "image_size",
           "read_mapping"]

# A flag that may be left out. Its help text says what happens then, which "(default: None)" would not.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """The keys and values of a YAML file; none of an empty one.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Expected --config to be a file that can be read. Got {path}: "
                        f"{error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Expected {path} to be YAML. Got: {error}.") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise UserError(f"Expected {path} to hold 'key: value' lines. Got a {type(content).__name__}.")
    return content


def coerce(name: str, value: Any, kind: Any, path: str | Path) -> Any:
    """``value`` as the field's type. YAML 1.1 reads 5e-4 as text and 1 as integer; both are good floats."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(coerce(name, item, get_args(kind)[0], path) for item in value)
    options = getattr(kind, "__args__", (kind,))
    if isinstance(value, str) and any(value in get_args(option) for option in options if get_origin(option) is Literal):
        return value
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    if target is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is target:
        return value
    raise UserError(f"Expected {name} in {path} to be {target.__name__}. Got {value!r}.")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def image_size(text: str) -> tuple[int, int]:
    """Height and width of "HxW".

    Raises:
        UserError: not two numbers of at least 1.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"Expected --image to be HEIGHTxWIDTH in pixels, such as 1080x1920, or 1x1 for coordinates that are "
                        f"parts of the image. Got {text!r}.")
    return int(parts[0]), int(parts[1])


def check_device(name: str, argument: str = "--device") -> None:
    """Check that torch knows the device and that it is there.

    Raises:
        UserError: an unknown name, or no such device on this machine.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Expected {argument} to be cpu, cuda or cuda:N. Got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Expected {argument} to be cpu, cuda or cuda:N. Got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"Expected {argument} to be a device of this machine. Got {name!r}, but torch sees "
                        f"{torch.cuda.device_count()} CUDA devices; use --device cpu.")


def check_part(split: str | None, fold: int | None) -> None:
    """Check that the part of an archive to test on is named once: a fold is a split, too.

    Raises:
        UserError: it is named twice.
    """
    if split is not None and fold is not None:
        raise UserError(f"Expected --split or --fold, as each names the sequences to test on. Got --split {split} and --fold "
                        f"{fold}; remove one of the two.")
