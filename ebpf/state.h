/* SPDX-License-Identifier: GPL-2.0-only */
/* The life of a NAT slot: what a packet does to its state, and when the slot may be taken. */
#ifndef LB_STATE_H
#define LB_STATE_H

#include "wire.h"
#include "layout.h"

/* A connection is established once the client has answered the backend's answer: a spoofed SYN
 * never gets there, so a flood of them only holds short-lived slots.
 */
LB_INLINE __u32 nat_state_after_client(__u32 state, __u8 flags)
{
	if (state >= LB_NAT_UDP)
		return state;
	if (flags & LB_TCP_RST)
		return LB_NAT_CLOSED;
	if (flags & LB_TCP_FIN)
		return state == LB_NAT_FIN_BACKEND || state == LB_NAT_CLOSED ? LB_NAT_CLOSED
									     : LB_NAT_FIN_CLIENT;
	if (state == LB_NAT_SYN_ACK && !(flags & LB_TCP_SYN))
		return LB_NAT_ESTABLISHED;
	return state;
}

LB_INLINE __u32 nat_state_after_backend(__u32 state, __u8 flags)
{
	if (state >= LB_NAT_UDP)
		return LB_NAT_UDP_STREAM;
	if (flags & LB_TCP_RST)
		return LB_NAT_CLOSED;
	if (flags & LB_TCP_FIN)
		return state == LB_NAT_FIN_CLIENT || state == LB_NAT_CLOSED ? LB_NAT_CLOSED
									    : LB_NAT_FIN_BACKEND;
	if (state == LB_NAT_SYN && (flags & LB_TCP_SYN))
		return LB_NAT_SYN_ACK;
	return state;
}

/* `life` of an entry: state 0-7, generation 16-31, tick 32-63. */
LB_INLINE __u64 nat_life(__u32 state, __u16 generation, __u32 tick)
{
	return state | (__u64)generation << 16 | (__u64)tick << 32;
}

LB_INLINE __u32 nat_state(__u64 life)
{
	return life & (LB_NAT_STATES - 1);
}

LB_INLINE __u16 nat_generation(__u64 life)
{
	return life >> 16;
}

/* Ticks since the slot's last packet, begun ones too: another CPU may be one tick ahead of us. */
LB_INLINE __u32 nat_idle(__u64 life, __u32 now)
{
	return now + 1 - (__u32)(life >> 32);
}

#endif
