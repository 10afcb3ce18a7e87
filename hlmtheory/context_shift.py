"""What a policy's own outputs do to the contexts that follow: a pilot's shift, scaled; (60)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hlmtheory.clusters import RatioEstimate, answer_rows, estimate_of


def along_answers(prompt_index: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of every answer's token t, for t = 1, 2, ...; the token before is the row before.

    `prompt_index` (N,) holds each token's prompt, ordered by prompt and step.
    """
    starts, lengths = answer_rows(prompt_index)
    for step in range(1, int(lengths.max(initial=0))):
        yield starts[lengths > step] + step


def parted_before(bias: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    r"""How likely an answer has left the server's before each token, to first order, (N,).

    .. math:: q_t = 1 - \prod_{s < t} (1 - b_s)

    with b_s the bias, the total variation between the laws that token s is drawn from. It stands in
    for the probability, which (47) has and which needs the law at the output.

    Parameters
    ----------
    bias : float array (N,)
        At the contexts of answers that follow the server.
    prompt_index : int array (N,)
        Ordered by prompt and step.
    """
    together = np.ones(len(bias))
    for rows in along_answers(prompt_index):
        together[rows] = together[rows - 1] * (1.0 - np.clip(bias[rows - 1], 0.0, 1.0))
    return 1.0 - together


def on_own_road(
    server: RatioEstimate,
    pilot: RatioEstimate,
    paired: RatioEstimate,
    parted: RatioEstimate,
    pilot_parted: RatioEstimate,
    place: np.ndarray,
) -> RatioEstimate:
    r"""A mean over a policy's own contexts from the server's and a pilot's; docs/theory.md, (60).

    .. math:: \hat\theta = \hat\theta_{server} + \frac{q}{q_0}
              \left(\hat\theta_{pilot} - \hat\theta_{paired}\right)

    Assumes that a token after the parting is moved by as much as one of the pilot's: what that is
    wrong by is not in the error, which is the sampling error of all five, to first order, prompt by
    prompt. The pilot's part is as large as N prompts of their own make it.

    Parameters
    ----------
    server : RatioEstimate
        The mean at the server's contexts, n prompts.
    pilot, paired : RatioEstimate
        The same mean at the pilot's contexts, and at the server's, on the pilot's N prompts.
    parted, pilot_parted : RatioEstimate
        q and q_0, share of tokens that come after the parting: of the policy on the n prompts, of
        the pilot on its N.
    place : int array (N,)
        Of each pilot prompt among the n.

    Returns
    -------
    RatioEstimate
        The server's, where the pilot never parts.
    """
    if pilot_parted.value <= 0:
        return server
    scale = parted.value / pilot_parted.value
    shift = pilot.value - paired.value
    influence = np.nan_to_num(server.influence)
    influence += shift / pilot_parted.value * np.nan_to_num(parted.influence)
    of_pilot = scale * (pilot.influence - paired.influence)
    of_pilot = of_pilot - shift * scale / pilot_parted.value * pilot_parted.influence
    few, all_prompts = len(place), len(influence)
    if few > 1:  # n prompts lose one degree of freedom, and so do the pilot's N
        of_pilot = of_pilot * np.sqrt(few * (all_prompts - 1) / ((few - 1) * all_prompts))
    influence[place] += np.nan_to_num(of_pilot)
    return estimate_of(server.value + scale * shift, influence)
