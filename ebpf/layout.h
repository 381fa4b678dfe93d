/* SPDX-License-Identifier: GPL-2.0-only */
/* What lies in the maps. lbagent/xdp/codec.py is the twin of this file; a test compares the sizes.
 * A change of meaning here needs a new LB_LAYOUT, which is part of the path the maps are pinned at.
 * Whatever the data path reads while the daemon writes it changes by one aligned store: `target`
 * of a VIP, `path` of a neighbour.
 */
#ifndef LB_LAYOUT_H
#define LB_LAYOUT_H

#include "wire.h"

#define LB_LAYOUT 1

/* Limits; the daemon overrides them by -D and creates the maps accordingly. */
#ifndef LB_VIPS
#define LB_VIPS 4097 /* ids start at 1: one more than the VIPs one may have */
#endif
#ifndef LB_BACKENDS
#define LB_BACKENDS 4097
#endif
#ifndef LB_FLOW_LINES
#define LB_FLOW_LINES 131072 /* a power of two; 64 bytes, 8 flows each */
#endif
#ifndef LB_INDEX_BITS
#define LB_INDEX_BITS 17 /* 2^n entries of 8 bytes: eight times what is kept there */
#endif
#ifndef LB_NAT_SHIFT
#define LB_NAT_SHIFT 14 /* 2^n buckets of 4 ports, 128 bytes, for each SNAT address */
#endif
#ifndef LB_TICK_SHIFT
#define LB_TICK_SHIFT 8 /* a tick is 2^n jiffies, about a second: 1.024 s at HZ 250 */
#endif

#define LB_RING_SLOTS	  65537
#define LB_SLOTS_PER_LINE 32
#define LB_SLOT_LINES	  2049 /* 65537 / 32, rounded up */
#define LB_MEMBER_LINES	  ((LB_BACKENDS + 511) / 512)
/* A ring: its head, its slots, who may keep flows, who may get new ones. */
#define LB_RING_LINES (1 + LB_SLOT_LINES + 2 * LB_MEMBER_LINES)

enum lb_mode { LB_MODE_NAT = 1, LB_MODE_DSR_L2, LB_MODE_DSR_IPIP };

/* lb_index: from (address, port, protocol) to an id, by open addressing: tag 16-63, id 0-15, 0 is
 * the end of the search. What is found is compared with the record that the id names. Besides VIPs
 * there are two keys for each address, with port 0 and these protocols:
 */
#define LB_KEY_VIP_ADDRESS 0   /* id of one of the VIPs at this address */
#define LB_KEY_SNAT	   255 /* index into lb_snats */
#define LB_INDEX_PROBES	   16

/* lb_filter: 64 bytes of 32 hints. A hint of 0 says: no packet to such an address is ours. */
#define LB_HINTS	  32768
#define LB_HINTS_PER_LINE 32
#define LB_HINT_VIP	  0x8000
#define LB_HINT_SNAT	  0x7fff /* 1 + index into lb_snats; 0 none */
struct filter_line {
	__u16 hints[LB_HINTS_PER_LINE];
};

/* lb_vips */
struct vip {
	__u64 target; /* ring 0-15, node port (wire) 16-31, mode 32-39, flags 40-47, ranges 48-63 */
	__u64 salt;   /* new for every VIP that gets this id: flows of the one before never match */
	__be32 address[4];
	__be16 port;
	__u8 protocol;
	__u8 family;
	__u32 affinity_ticks;	  /* 0: none */
	__u32 new_flows_per_tick; /* per source prefix; 0: no limit */
	__u32 affinity_s;	  /* as it was wished, for reading back */
	__u32 reserved[4];
};
_Static_assert(sizeof(struct vip) == 64, "one cache line");

/* lb_rings */
union ring_line {
	struct {
		__u64 fingerprint;
		__u32 backends;
	} head;
	__u16 slots[LB_SLOTS_PER_LINE]; /* backend ids, 0: nobody */
	__u64 members[8];		/* one bit per backend id */
};
_Static_assert(sizeof(union ring_line) == 64, "one cache line");

/* The way to a machine on one of our segments. */
struct hop {
	__u32 ifindex;
	__u8 macs[12]; /* destination, source */
	__be16 outer;  /* VLAN id, 0: no tag */
	__be16 inner;
};

/* lb_backends, lb_routers: two hops, of which `path` names the one that holds */
#define LB_PATH_SECOND	  0x1
#define LB_PATH_USABLE	  0x2
#define LB_PATH_MTU_SHIFT 16
struct neighbour {
	__be32 address[4];
	__u32 path; /* flags 0-15, MTU 16-31 */
	__u8 family;
	__u8 reserved[3];
	struct hop hops[2];
};
_Static_assert(sizeof(struct neighbour) == 64, "one cache line");

/* lb_routers: 0 and 1 are where packets to clients go when nothing better is known */
#define LB_ROUTERS	   1024
#define LB_ROUTER_DEFAULT4 0
#define LB_ROUTER_DEFAULT6 1

/* lb_router_ids: who sent this frame -> index into lb_routers */
struct router_key {
	__u32 ifindex;
	__u8 mac[6];
	__be16 vlan; /* outermost VLAN id, 0: no tag */
};

/* lb_snats */
struct snat {
	__be32 address[4];
	__u8 family;
	__u8 reserved[15];
};

/* lb_flows: flows of the DSR modes, 8 to a line, each one aligned word:
 * backend 0-15, age (ticks) 16-27, stage 28-29, tag 30-63
 */
struct flow_line {
	__u64 flows[8];
};

/* lb_nat: flows of mode nat; the slot's number is the SNAT port. */
struct nat_entry {
	__u64 key;   /* client port 0-15, VIP id 16-31, first word of the client's address 32-63 */
	__u64 more;  /* second and third word of an IPv6 client */
	__u64 where; /* fourth word 0-31, backend 32-47, router 48-63 */
	__u64 life;  /* state 0-7, generation 16-31, tick of the last packet 32-63 */
};
#define LB_NAT_WAYS 4
struct nat_bucket {
	struct nat_entry entries[LB_NAT_WAYS];
};

enum nat_state {
	LB_NAT_FREE,
	LB_NAT_CLAIMED, /* somebody is writing the rest of the entry */
	LB_NAT_SYN,	/* the client spoke */
	LB_NAT_SYN_ACK, /* the backend answered */
	LB_NAT_ESTABLISHED,
	LB_NAT_FIN_CLIENT,
	LB_NAT_FIN_BACKEND,
	LB_NAT_CLOSED,
	LB_NAT_UDP,	   /* the client spoke */
	LB_NAT_UDP_STREAM, /* the backend answered */
	LB_NAT_STATES = 16,
};

/* lb_ranges4, lb_ranges6: who may talk to VIPs with this set of source ranges */
struct range_key4 {
	__u32 prefix_bits; /* 32 + those of the network */
	__u32 set;
	__be32 address;
};
struct range_key6 {
	__u32 prefix_bits;
	__u32 set;
	__be32 address[4];
};

/* lb_affinity */
struct client_key {
	__be32 address[4];
	__u16 vip;
	__u16 generation;
};
struct client {
	__u32 seen; /* tick */
	__u16 backend;
	__u16 reserved;
};

/* lb_fragments: what the first fragment decided for the others */
struct fragment_key {
	__be32 source[4];
	__be32 destination[4];
	__be32 id;
	__u32 protocol;
};
struct fragment {
	__be32 source[4]; /* in mode nat the addresses they get */
	__be32 destination[4];
	__u32 seen; /* tick */
	__u16 vip;
	__u16 backend;
	__u16 router; /* of a reply */
	__u8 mode;
	__u8 is_reply;
	__u32 reserved;
};

/* lb_limits: new flows of a source prefix (IPv4 /24, IPv6 /56) in this tick */
struct limit_key {
	__be32 prefix[2];
	__u32 vip;
};
struct limit { /* also lb_answers, by CPU: the ICMP and RST we send */
	__u32 tick;
	__u32 spent;
};

/* lb_scratch, by CPU: what rare paths would keep on the stack, if it were longer than 512 bytes */
struct question { /* what the packet that we answer said */
	__be32 source[4], destination[4];
	__be16 remote_port, local_port;
	__be32 sequence, acknowledged;
	__u32 segment_bytes; /* sequence space: payload, SYN and FIN */
	__u8 macs[12];
	__be32 types[3]; /* what stood behind the MAC addresses: tags and Ethertype */
};
struct scratch {
	struct question question;
	struct fragment_key fragment_key;
	struct fragment fragment;
};
_Static_assert(sizeof(struct scratch) == 160, "the size the map is made with");

/* lb_counters: one line per CPU and counter: [cpu][verdict | VIP | backend] */
#define LB_COUNTER_VERDICTS 64
#define LB_COUNTERS	    (LB_COUNTER_VERDICTS + LB_VIPS + LB_BACKENDS)
struct counter {
	__u64 packets, bytes;	    /* bytes of the IP packet as it arrived */
	__u64 replies, reply_bytes; /* from backends, mode nat */
	__u64 flows;		    /* new ones */
	__u64 drops;
	__u64 reserved[2];
};
_Static_assert(sizeof(struct counter) == 64, "one cache line");

/* lb_config: one element */
enum lb_policy { LB_POLICY_DROP, LB_POLICY_ANSWER, LB_POLICY_PASS };
struct config {
	__u64 seed;		    /* of the ring: the same on every LB host */
	__u16 snats4_first, snats4; /* indices into lb_snats */
	__u16 snats6_first, snats6;
	__u16 port_first;  /* lowest SNAT port */
	__u16 nat_buckets; /* buckets in use for each address: 4 ports each */
	__u8 no_port;	   /* enum lb_policy: VIP without that port */
	__u8 options;	   /* IPv4 options and IPv6 extension headers: LB_POLICY_DROP or _PASS */
	__u8 echo;	   /* LB_POLICY_ANSWER or _DROP */
	__u8 reserved;
	__be32 tunnel4, tunnel4_mask; /* outer source; the flow's hash fills the bits of the mask */
	__be32 tunnel6[4], tunnel6_mask;
	__u32 answers_per_tick; /* ICMP and RST we send, per CPU */
	__u32 udp_ticks;	/* a DSR flow of UDP is forgotten after this time */
	__u32 spare[1];
	__u32 timeout[LB_NAT_STATES];  /* ticks without a packet after which a slot is free */
	__u32 pressure[LB_NAT_STATES]; /* the same when no slot is free otherwise */
};
_Static_assert(sizeof(struct config) == 192, "three cache lines");

#endif
