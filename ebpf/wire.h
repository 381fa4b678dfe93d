/* SPDX-License-Identifier: GPL-2.0-only */
/* Where the protocol headers come from: the kernel's tree under BCC, the C library on a host. */
#ifndef LB_WIRE_H
#define LB_WIRE_H

#ifdef __KERNEL__
#include <uapi/linux/bpf.h>
#include <uapi/linux/icmp.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>
#else
#include <linux/bpf.h>
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#endif

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#define LB_INLINE static __always_inline

/* Little-endian machines only: x86-64 and arm64. */
#define LB_BE16(x)   ((__be16)__builtin_bswap16((__u16)(x)))
#define LB_BE32(x)   ((__be32)__builtin_bswap32((__u32)(x)))
#define LB_HOST16(x) __builtin_bswap16((__u16)(x))
#define LB_HOST32(x) __builtin_bswap32((__u32)(x))

/* Words of a header that was written by its fields, or the other way round. */
typedef __u16 __attribute__((may_alias)) lb_half;
typedef __u32 __attribute__((may_alias)) lb_word;

#define LB_MORE_FRAGMENTS  0x2000
#define LB_DONT_FRAGMENT   0x4000
#define LB_FRAGMENT_OFFSET 0x1fff

#define LB_TCP_FIN 0x01
#define LB_TCP_SYN 0x02
#define LB_TCP_RST 0x04
#define LB_TCP_ACK 0x10

/* `x`, of which the verifier knows nothing any more but that it is at most `mask`: so it walks the
 * rest of the journey once, and not once for every value `x` may have. `unknown`: anything read.
 */
LB_INLINE __u64 lb_forget(__u64 x, __u64 unknown, const __u64 mask)
{
#if defined(__KERNEL__) || defined(__bpf__)
	asm volatile("%0 ^= %1\n\t%0 ^= %1" : "+r"(x) : "r"(unknown));
#endif
	return x & mask;
}

/* A packet pointer that the compiler must not compute a second time: the verifier would take the
 * second one for another pointer, whose bounds nobody has checked.
 */
#if defined(__KERNEL__) || defined(__bpf__)
#define LB_KEEP(pointer) asm volatile("" : "+r"(pointer))
#else
#define LB_KEEP(pointer)
#endif

struct vlan_tag { /* what follows the Ethernet addresses and the tag's own type */
	__be16 control;
	__be16 protocol;
};

struct fragment6 { /* RFC 8200, 4.5 */
	__u8 next;
	__u8 reserved;
	__be16 offset; /* in units of 8 bytes << 3, bit 0: more fragments */
	__be32 id;
};

#endif
