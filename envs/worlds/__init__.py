"""Worlds in which the depth of computation that a step needs is known; importing this registers them.

Each reports it in info["difficulty"]. See docs/worlds.md. Entry points are strings, so that naming the worlds
imports neither them nor dm_control.
"""

import gymnasium

# Written down, because asking dm_control for them costs a second; a test compares. lqr is left out: its actions
# are unbounded and its episodes have no end.
_DMC_TASKS = {
    "acrobot": ["swingup", "swingup_sparse"],
    "ball_in_cup": ["catch"],
    "cartpole": ["balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"],
    "cheetah": ["run"],
    "dog": ["stand", "walk", "trot", "run", "fetch"],
    "finger": ["spin", "turn_easy", "turn_hard"],
    "fish": ["upright", "swim"],
    "hopper": ["stand", "hop"],
    "humanoid": ["stand", "walk", "run", "run_pure_state"],
    "humanoid_CMU": ["stand", "walk", "run"],
    "manipulator": ["bring_ball", "bring_peg", "insert_ball", "insert_peg"],
    "pendulum": ["swingup"],
    "point_mass": ["easy", "hard"],
    "quadruped": ["walk", "run", "escape", "fetch"],
    "reacher": ["easy", "hard"],
    "stacker": ["stack_2", "stack_4"],
    "swimmer": ["swimmer6", "swimmer15"],
    "walker": ["stand", "walk", "run"],
}
TIME_WARP_TASKS = tuple(f"{domain}-{kind}" for domain, kinds in _DMC_TASKS.items() for kind in kinds)


def register_worlds() -> None:
    """Register every world under "loopwm/" with Gymnasium."""
    permutation = "envs.worlds.permutation:PermutationEnv"
    gymnasium.register("loopwm/Sandpile-v0", "envs.worlds.sandpile:SandpileEnv", max_episode_steps=100)
    gymnasium.register("loopwm/Permutation-v0", permutation, max_episode_steps=50)
    gymnasium.register("loopwm/PermutationHidden-v0", permutation, max_episode_steps=50, kwargs={"hidden": True})
    for task in TIME_WARP_TASKS:
        # No max_episode_steps: dm_control counts control steps, Gymnasium would count decisions.
        entry = "envs.worlds.time_warp:TimeWarpEnv"
        gymnasium.register(f"loopwm/TimeWarp-{task}-v0", entry, kwargs={"task": task})


register_worlds()
