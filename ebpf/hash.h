/* SPDX-License-Identifier: GPL-2.0-only */
/* Mixing, and what is cut out of a hash: places in lb_filter, lb_index, rings and tables. */
#ifndef LB_HASH_H
#define LB_HASH_H

#include "wire.h"
#include "layout.h"

/* A bijection of 64 bits (a multiply-xorshift finaliser; 3.5 ns latency, measured). */
LB_INLINE __u64 mix(__u64 x)
{
	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93ull;
	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93ull;
	return x ^ (x >> 32);
}

LB_INLINE __u64 mix_address(const __be32 *a, __u64 x)
{
	x = (x ^ ((__u64)a[0] << 32 | a[1])) * 0xe7037ed1a0b428dbull;
	x ^= x >> 32;
	x = (x ^ ((__u64)a[2] << 32 | a[3])) * 0x8ebc6af09c88c6e3ull;
	return x ^ (x >> 32);
}

/* 15 bits of an address: its place in lb_filter. */
LB_INLINE __u32 hint_index4(__be32 address)
{
	return (__u32)(address * 0x9e3779b1u) >> 17;
}

LB_INLINE __u32 hint_index6(const __be32 *a)
{
	return hint_index4(a[0] ^ (a[1] << 7 | a[1] >> 25) ^ (a[2] << 14 | a[2] >> 18) ^
			   (a[3] << 21 | a[3] >> 11));
}

/* Key of lb_index: one multiplication will do, for nobody chooses VIPs to collide. */
LB_INLINE __u64 index_hash(const __be32 *address, __be16 port, __u8 protocol, const int v6)
{
	__u64 x = (__u64)port << 16 | protocol;

	if (v6)
		return mix_address(address, x);
	x = (x | (__u64)address[0] << 32) * 0xd6e8feb86659fd93ull;
	return x ^ (x >> 32);
}

/* Slot of a ring, by multiplication instead of modulo. */
LB_INLINE __u32 ring_slot(__u64 hash)
{
	return ((hash >> 32) * LB_RING_SLOTS) >> 32;
}

/* The second place a NAT flow may live. */
LB_INLINE __u64 second_hash(__u64 hash)
{
	return mix(hash + 0x9e3779b97f4a7c15ull);
}

#endif
