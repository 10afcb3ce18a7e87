"""The link of a prediction as a relay carries it."""

from __future__ import annotations

from calibrate.wire.relay import Rate, WireLink
from hlmtheory.link import AwgnLink, Link, RateLink, RayleighOutageLink, TraceLink


def wire_link(link: Link) -> WireLink:
    """Rates and delay of a link.

    A link with outages is carried at the rate of its mean time. Assumption, where the link says
    nothing of it: the downlink is as the uplink.
    """
    down: Rate | None = None
    match link:
        case AwgnLink():
            up = Rate((link.rate_bps,))
        case RateLink():
            up = Rate((link.rate_bps,))
            down = None if link.downlink_bps is None else Rate((link.downlink_bps,))
        case RayleighOutageLink():
            up = Rate((link.rate_bps * (1.0 - link.outage),))
        case TraceLink():
            up = Rate(link.rates_bps, 1e-3 * link.sample_interval_ms)
        case _:
            raise ValueError(f"link {type(link).__name__}: has no rate")
    return WireLink(up, down or up, link.round_trip_ms)
