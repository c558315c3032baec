"""The word problem of S5: the product of a word of permutations, letter by letter.

Sources: Barrington 1989 (this problem is complete for NC1, so a circuit of fixed depth is not believed to solve it for
every length), Merrill, Petty, Sabharwal 2024, "The Illusion of State in State-Space Models", arXiv 2404.08819 (what
that means for sequence models). For a fixed longest word, as here, enough width could store all answers: depth is what
generalises over k, not what is needed at k = 2.
"""

import itertools
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from envs.errors import TaskError
from envs.worlds.arguments import equal_bins, is_whole
from envs.worlds.drawing import grid_frame

POINTS = 5
PERMUTATIONS = np.array(list(itertools.permutations(range(POINTS))))  # (120, 5), lexicographic; 0 is the identity
# The identity lets a plan wait; the swap and the cycle generate S5, and the cycle's inverse shortens words.
GENERATORS = np.array([(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0), (4, 0, 1, 2, 3)])  # (4, 5)


def _product_table() -> np.ndarray:
    """The state after one letter, (120, 4): p * g maps i to p[g[i]]."""
    index = {tuple(p): i for i, p in enumerate(PERMUTATIONS.tolist())}
    return np.array([[index[tuple(p[g].tolist())] for g in GENERATORS] for p in PERMUTATIONS])


AFTER = _product_table()  # (120, 4)


def compose(states: np.ndarray, words: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Apply the first k letters of each word in order: state * g1 * g2 * ... * gk.

    Args:
        states: rows of PERMUTATIONS, integers (B,).
        words: rows of GENERATORS, integers (B, K); from k on ignored.
        k: letters to apply, integers in 0..K, (B,).

    Returns:
        The states afterwards, rows of PERMUTATIONS, (B,).

    Raises:
        ValueError: shapes that do not fit, or numbers out of range.
    """
    states, words, k = np.array(states), np.asarray(words), np.asarray(k)
    if words.ndim != 2 or not len(words) == len(states) == len(k) or states.ndim != 1 or k.ndim != 1:
        raise ValueError(f"expected (B,), (B, K), (B,), got {states.shape}, {words.shape}, {k.shape}")
    _check_range("states", states, len(PERMUTATIONS) - 1)
    _check_range("words", words, len(GENERATORS) - 1)
    _check_range("k", k, words.shape[1])
    for letter in range(int(k.max(initial=0))):
        states = np.where(letter < k, AFTER[states, words[:, letter]], states)
    return states


def _check_range(name: str, values: np.ndarray, largest: int) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= largest):
        raise ValueError(f"{name} must be in 0..{largest}")


class PermutationEnv(gymnasium.Env):
    """Bring a permutation to a goal with words of generators whose length the world dictates.

    obs: float32 (25 + max_k + 25,): the state's permutation matrix (row i has its 1 in column p[i]), the length k
    of the next word one-hot, the goal's matrix. action: Box [-1, 1] (max_k,); entry j, cut into four equal
    bins, is letter j of the word (a row of GENERATORS), entries from k on are ignored. reward: 1 if the
    state equals the goal after the step, else 0; then another goal is drawn and the episode goes on.
    Never terminated. A goal is up to ten letters away, so short words must head towards it without pay.

    info["difficulty"]: k of the word just applied, the number of products in sequence.

    Args:
        min_k: shortest word, >= 1.
        max_k: longest word, >= min_k. k is drawn uniformly for every step.
        hidden: show the state's matrix in an episode's first obs only (zeros later), which makes this a test of
            state tracking. Off by default: the agents here encode one obs without memory, and for them the
            obs has to be Markov.
        render_mode: None or "rgb_array".

    Raises:
        TaskError: a bad min_k or max_k.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, min_k: int = 1, max_k: int = 8, hidden: bool = False, render_mode: str | None = None):
        if not (is_whole(min_k, 1) and is_whole(max_k, min_k)):
            raise TaskError(f"a word's length must be whole numbers 1 <= min_k <= max_k, got {min_k!r} and {max_k!r}")
        self.render_mode = render_mode
        self._min_k, self._max_k, self._hidden = int(min_k), int(max_k), bool(hidden)
        self.observation_space = Box(0.0, 1.0, (2 * POINTS**2 + self._max_k,), np.float32)
        self.action_space = Box(-1.0, 1.0, (self._max_k,), np.float32)
        self.state = self.goal = 0  # rows of PERMUTATIONS
        self.k = self._min_k  # letters of the next word

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Draw a state, a goal and the first k. Return obs and an empty info."""
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(len(PERMUTATIONS)))
        self.goal, self.k = self._draw_goal(), self._draw_k()
        return self._observation(show_state=True), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply the word in `action` (max_k,), then draw the next k, and another goal if this one is reached."""
        difficulty = self.k
        self.state = int(compose([self.state], letters(action)[None], [self.k])[0])
        reached = self.state == self.goal
        if reached:
            self.goal = self._draw_goal()
        self.k = self._draw_k()
        return self._observation(show_state=not self._hidden), float(reached), False, False, {"difficulty": difficulty}

    def render(self) -> np.ndarray:
        """Return a frame, uint8 (80, 176, 3): the state's matrix, a grey line, the goal's matrix."""
        line = np.full((POINTS, 1), 0.5)
        return grid_frame(np.hstack([_matrix(self.state), line, _matrix(self.goal)]))

    def _draw_goal(self) -> int:
        goal = int(self.np_random.integers(len(PERMUTATIONS) - 1))
        return goal + (goal >= self.state)  # any but the state itself

    def _draw_k(self) -> int:
        return int(self.np_random.integers(self._min_k, self._max_k + 1))

    def _observation(self, show_state: bool) -> np.ndarray:
        state = _matrix(self.state) if show_state else np.zeros((POINTS, POINTS))
        length = np.arange(1, self._max_k + 1) == self.k
        return np.concatenate([state.ravel(), length, _matrix(self.goal).ravel()]).astype(np.float32)


def letters(action: np.ndarray) -> np.ndarray:
    """Return the rows of GENERATORS that an action (..., K) in [-1, 1] spells, (..., K)."""
    return equal_bins(action, len(GENERATORS))


def _matrix(state: int) -> np.ndarray:
    return np.eye(POINTS)[PERMUTATIONS[state]]  # (5, 5)
