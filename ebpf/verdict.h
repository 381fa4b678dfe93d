/* SPDX-License-Identifier: GPL-2.0-only */
/* What happened to a packet: one verdict each, every one counted. lbagent/xdp/verdict.py is the
 * twin of this list, and a test compares them. The order is the meaning: up to LB_LAST_PASS the
 * kernel gets the packet, up to LB_LAST_FORWARD it went on, up to LB_LAST_ANSWER we replied to its
 * sender, the others were dropped.
 */
#ifndef LB_VERDICT_H
#define LB_VERDICT_H

enum verdict {
	LB_NOT_IP,
	LB_NOT_OURS,
	LB_NO_SLOT,
	LB_LAST_PASS = LB_NO_SLOT,

	LB_NAT_FORWARD,
	LB_NAT_REPLY,
	LB_DSR_L2,
	LB_DSR_IPIP,
	LB_FRAGMENT_FORWARD,
	LB_ICMP_TO_BACKEND,
	LB_ICMP_TO_CLIENT,
	LB_LAST_FORWARD = LB_ICMP_TO_CLIENT,

	LB_ECHO_ANSWERED,
	LB_PORT_REFUSED,
	LB_NO_FLOW_RESET,
	LB_TOO_BIG_ANSWERED,
	LB_TTL_ANSWERED,
	LB_LAST_ANSWER = LB_TTL_ANSWERED,

	LB_MALFORMED,
	LB_IP_OPTIONS,
	LB_EXTENSION_HEADER,
	LB_PROTOCOL,
	LB_NO_PORT,
	LB_SOURCE_DENIED,
	LB_NEW_FLOW_LIMIT,
	LB_NO_BACKEND,
	LB_NO_NEXTHOP,
	LB_NO_FLOW,
	LB_NAT_FULL,
	LB_TTL_EXPIRED,
	LB_TOO_BIG,
	LB_FRAGMENT_LOST,
	LB_ICMP_UNMATCHED,
	LB_ICMP_LIMIT,
	LB_NO_HEADROOM,
	LB_VERDICTS, /* how many there are */

	LB_CONTINUE = 255, /* not a verdict: the journey goes on */
};

#endif
