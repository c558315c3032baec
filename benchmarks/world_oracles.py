"""What planning is worth in our worlds: policies that know the rules, from random to looking ahead.

python -m benchmarks.world_oracles --episodes 20 --json docs/results/world_oracles.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import gymnasium
import numpy as np

import envs  # noqa: F401 - registers the worlds
from benchmarks.harness import interval, parser, report
from envs.worlds.permutation import AFTER, GENERATORS, PERMUTATIONS, PermutationEnv
from envs.worlds.sandpile import SandpileEnv, least_mass, topple

Policy = Callable[[gymnasium.Env, np.random.Generator], object]
BEAM = 64  # piles kept at each depth of a plan; at depth 1 that is all of them for S = 8


def random_policy(env: gymnasium.Env, rng: np.random.Generator) -> object:
    """An action drawn from `rng`."""
    env.action_space.seed(int(rng.integers(2**31)))
    return env.action_space.sample()


def drop_plan(env: SandpileEnv, rng: np.random.Generator, depth: int) -> int:
    """First drop of the plan that drains the pile soonest, or else makes it lightest `depth` drops from now."""
    pile = env.pile
    cells = pile.size
    one_grain = np.eye(cells, dtype=np.int32).reshape(cells, *pile.shape)  # (C, S, S)
    beam, first = pile[None], None
    for _ in range(depth):
        piles = topple((beam[:, None] + one_grain).reshape(-1, *pile.shape))[0]  # (beam * C, S, S)
        first = np.arange(cells) if first is None else np.repeat(first, cells)
        mass = piles.sum((1, 2)) + 0.5 * rng.random(len(piles))  # ties are broken by chance
        best = np.argsort(mass)[:BEAM]
        beam, first = piles[best], first[best]
        if mass[best[0]] < least_mass(len(pile)) + 0.5:
            break  # drained: no plan can do it in fewer drops
    return int(first[0])


def word_distances() -> np.ndarray:
    """Letters of the shortest word whose product is each permutation, (120,)."""
    distance = np.full(len(PERMUTATIONS), -1)
    distance[0], frontier = 0, np.array([0])
    while len(frontier):
        following = np.unique(AFTER[frontier])
        following = following[distance[following] < 0]
        distance[following], frontier = distance[frontier[0]] + 1, following
    return distance


DISTANCE = word_distances()


def word_plan(env: PermutationEnv, rng: np.random.Generator, shape_far: bool) -> np.ndarray:
    """A shortest way to the goal; where k letters do not reach it, its first k letters or a random word."""
    state, word = env.state, rng.integers(len(GENERATORS), size=env.action_space.shape)
    if shape_far or _distance(state, env.goal) <= env.k:
        for letter in range(env.k):
            following = AFTER[state]
            word[letter] = np.argmin([_distance(other, env.goal) for other in following])
            state = following[word[letter]]
    return (word.astype(np.float32) + 0.5) / len(GENERATORS) * 2 - 1  # the middle of each bin


def _distance(state: int, goal: int) -> int:
    needed = np.argsort(PERMUTATIONS[state])[PERMUTATIONS[goal]]  # state^-1 * goal
    return int(DISTANCE[np.flatnonzero((needed == PERMUTATIONS).all(1))[0]])


def held_policy(env: gymnasium.Env, rng: np.random.Generator, hold: float) -> np.ndarray:
    """A random action with its last entry, TimeWarp's hold, set to `hold`."""
    action = random_policy(env, rng)
    action[-1] = hold
    return action


POLICIES: dict[str, dict[str, Policy]] = {
    "loopwm/Sandpile-v0": {
        "random": random_policy,
        "greedy": lambda env, rng: drop_plan(env, rng, 1),
        "two_steps": lambda env, rng: drop_plan(env, rng, 2),
        "three_steps_beam": lambda env, rng: drop_plan(env, rng, 3),
    },
    "loopwm/Permutation-v0": {
        "random": random_policy,
        "greedy": lambda env, rng: word_plan(env, rng, shape_far=False),
        "shortest_words": lambda env, rng: word_plan(env, rng, shape_far=True),
    },
    # No oracle here: only what the hold alone does to a policy that knows nothing.
    "loopwm/TimeWarp-cartpole-swingup-v0": {
        "random": random_policy,
        "random_hold_1": lambda env, rng: held_policy(env, rng, -1.0),
        "random_hold_16": lambda env, rng: held_policy(env, rng, 1.0),
    },
}


def episode(task: str, policy: Policy, seed: int) -> tuple[float, bool, list[int]]:
    """Return, whether it terminated, and the difficulty of each step of one episode."""
    env, rng = gymnasium.make(task, disable_env_checker=True), np.random.default_rng(seed)
    env.reset(seed=seed)
    total, over, difficulties = 0.0, False, []
    while not over:
        _, reward, terminated, truncated, info = env.step(policy(env.unwrapped, rng))
        total, over = total + reward, terminated or truncated
        difficulties.append(info["difficulty"])
    return total, terminated, difficulties


def measure(task: str, name: str, seeds: range) -> dict:
    """One row: a policy's episodes on a world."""
    episodes = [episode(task, POLICIES[task][name], seed) for seed in seeds]
    returns, terminated, difficulties = zip(*episodes, strict=True)
    percentiles = np.percentile(np.concatenate(difficulties), [50, 90, 99, 100])
    row = {"task": task, "policy": name, "returns": returns, "steps": [len(part) for part in difficulties]}
    row |= {"terminated": float(np.mean(terminated)), "difficulty_50_90_99_100": percentiles.round(1).tolist()}
    print(f"{task} {name}: steps {np.mean(row['steps']):.1f} +- {np.std(row['steps']):.1f}", end=", ")
    print(f"return {np.mean(returns):.2f} +- {np.std(returns):.2f}", end=", ")
    print(f"terminated {row['terminated']:.2f}, difficulty {row['difficulty_50_90_99_100']}", flush=True)
    return row


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--episodes", type=int, default=20)
    args = p.parse_args(arguments)
    seeds = range(3 if args.quick else args.episodes)
    rows = [measure(task, name, seeds) for task, policies in POLICIES.items() for name in policies]
    headline = {f"{row['task']} {row['policy']}": interval(row["returns"]) for row in rows}
    means = "; ".join(f"{name}: {figure['value']:.2f}" for name, figure in headline.items())
    report("world_oracles", args, seeds, rows, headline, f"Mean return over {len(seeds)} episodes: {means}.")


if __name__ == "__main__":
    main(sys.argv[1:])
