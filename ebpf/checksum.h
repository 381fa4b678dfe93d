/* SPDX-License-Identifier: GPL-2.0-only */
/* Internet checksums by difference (RFC 1624): nothing here touches a payload. */
#ifndef LB_CHECKSUM_H
#define LB_CHECKSUM_H

#include "wire.h"

LB_INLINE __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Sum of what is added when `old` becomes `new`; sums of several changes add up. */
LB_INLINE __u64 change32(__be32 old, __be32 new)
{
	return (__u64)(__u32)~old + new;
}

LB_INLINE __u64 change16(__be16 old, __be16 new)
{
	return (__u64)(__u16)~old + new;
}

LB_INLINE __u64 change128(const __be32 *old, const __be32 *new)
{
	return change32(old[0], new[0]) + change32(old[1], new[1]) + change32(old[2], new[2]) +
	       change32(old[3], new[3]);
}

/* The checksum after a change. */
LB_INLINE __u16 checksum_changed(__u16 check, __u64 change)
{
	return ~fold((__u64)(__u16)~check + change);
}

/* UDP: 0 means "none" and stays, a computed 0 is sent as ffff. */
LB_INLINE __u16 udp_checksum_changed(__u16 check, __u64 change)
{
	__u16 sum;

	if (!check)
		return 0;
	sum = checksum_changed(check, change);
	return sum ? sum : 0xffff;
}

/* One less TTL changes the word (TTL, protocol) by 0x0100 (RFC 1141). */
LB_INLINE __u16 checksum_ttl_decremented(__u16 check)
{
	__u32 sum = check + (__u32)LB_BE16(0x0100);

	return sum + (sum >= 0xffff);
}

#endif
