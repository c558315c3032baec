"""Turning the many ways in which OpenGL can be missing into one line that helps."""

import importlib
import os
import sys

from gymnasium.error import DependencyNotInstalled

from envs.errors import RenderingUnavailable, first_line

_HELP = "get it with `apt-get install libegl1 libgl1-mesa-dri` and `MUJOCO_GL=egl`"


def unavailable(error: BaseException, task: str) -> RenderingUnavailable:
    """Return the one-line error for `error`, which came up while drawing `task`.

    A missing Python package (gymnasium says which pip command) is told apart from a missing OpenGL.
    """
    reason = first_line(error)
    if isinstance(error, DependencyNotInstalled):
        return RenderingUnavailable(f"cannot render '{task}': {reason}")
    return RenderingUnavailable(f"cannot render '{task}': {_HELP} ({reason})")


def check_backend(task: str) -> None:
    """Import mujoco, which loads the GL backend named by MUJOCO_GL even for tasks that draw nothing.

    Raises:
        RenderingUnavailable: that backend does not load. (A missing mujoco is left to the suite to report.)
    """
    backend = os.environ.get("MUJOCO_GL")
    try:
        importlib.import_module("mujoco")
    except ModuleNotFoundError:
        return
    except Exception as error:  # of a kind that depends on the backend
        raise RenderingUnavailable(
            f"MUJOCO_GL={backend} does not load, which '{task}' needs: {_HELP}, or unset MUJOCO_GL to train "
            f"without frames ({first_line(error)})"
        ) from error


def prefer_egl() -> BaseException | None:
    """On a Linux machine without a display, select EGL if it works here and nobody has selected anything.

    MuJoCo's own default there is GLFW, which needs a display. Called only when frames are wanted, because it
    initialises the GPU's driver: state tasks train on machines without any GL.

    Returns:
        None, or why MuJoCo cannot draw here.
    """
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform != "linux" or display or os.environ.get("MUJOCO_GL"):
        return None
    try:
        importlib.import_module("mujoco.egl")  # fails unless it finds a device which it can open
    except Exception as error:  # of a kind that depends on the driver
        os.environ.pop("PYOPENGL_PLATFORM", None)
        return error
    os.environ["MUJOCO_GL"] = "egl"
    # dm_control picks its backend at import, which an env without frames may have caused already.
    if "dm_control._render" in sys.modules:
        importlib.reload(sys.modules["dm_control._render"])
    return None
