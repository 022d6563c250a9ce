"""Which clients take part in a round.

Uniform without replacement, as in B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629 (algorithm 1). The draw depends on the seed and the
round alone, so a resumed run, or another method under the same seed, meets the same clients.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lightning_fedsparse.seeding import derive_seed

__all__ = ["UniformSampling", "sample_cohort"]


class UniformSampling:
    """Every set of ``count`` clients is equally likely, independently in each round."""

    def sample(
        self,
        client_ids: Sequence[str],
        count: int,
        *,
        seed: int,
        round_index: int,
        draw: int = 0,
        excluded: Collection[str] = (),
    ) -> list[str]:
        """Draw the cohort of one round.

        Args:
            client_ids: All clients, in an order that is the same in every round; never copied.
            count: Clients to draw, from 1 to all of those that are not excluded.
            seed: The run's seed.
            round_index: The round, from 0.
            draw: Which of the round's draws this is, from 0; they are independent.
            excluded: Clients that were drawn before.

        Returns:
            Distinct ids in the order drawn.

        Raises:
            ValueError: A count below 1 or above the number of clients that are left.
        """
        if count < 1:
            raise ValueError(f"expected at least 1 client per round, got {count}")
        left = len(client_ids) - len(excluded)
        if count > left:
            raise ValueError(f"expected at most {left} clients per round, as many as there are, got {count}")
        further = (draw,) if draw else ()
        generator = np.random.default_rng(derive_seed(seed, "sampling", round_index, *further))
        # as many more as are excluded, so that enough are left whoever is drawn; each order is as likely as any other
        size = count + len(excluded)
        drawn = [client_ids[i] for i in generator.choice(len(client_ids), size=size, replace=False).tolist()]
        return [client_id for client_id in drawn if client_id not in excluded][:count]


def sample_cohort(
    client_ids: Sequence[str],
    counts: Sequence[int],
    *,
    seed: int,
    round_index: int,
    attempt: int,
    asked: Collection[str],
) -> list[str]:
    """Clients that were not asked in this round, from one draw for each of the counts, or as many as there are.

    Args:
        client_ids: All clients.
        counts: Clients to draw, such as those that are wanted and those asked beyond.
        seed: The run's seed.
        round_index: The round, from 0.
        attempt: How often the round has asked, from 0; always with as many counts.
        asked: Whom.
    """
    cohort: list[str] = []
    for draw, count in enumerate(counts, start=len(counts) * attempt):
        excluded = {*asked, *cohort}
        count = min(count, len(client_ids) - len(excluded))
        if count:
            cohort += UniformSampling().sample(
                client_ids, count, seed=seed, round_index=round_index, draw=draw, excluded=excluded
            )
    return cohort
