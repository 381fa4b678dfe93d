/* SPDX-License-Identifier: GPL-2.0-only */
/* What the journey knows on its way, and the maps: every name and most look-ups of the data path.
 * Maps are created by the daemon and known here by number (FD_<map>). */
#ifndef LB_MAPS_H
#define LB_MAPS_H

#define TRIAL_IFINDEX 1

#define MAP(name)	  bpf_pseudo_fd(1, FD_##name)
#define LOOKUP(name, key) bpf_map_lookup_elem_(MAP(name), key)
#define ONCE(x)		  (*(const volatile __typeof__(x) *)&(x))

/* What is left of the journey at its exit. It stays in memory: kept in registers, these would be
 * written anew at every fork of the road.
 */
struct result {
	__u32 bytes; /* of the IP packet as it arrived */
	__u32 vip_id;
	__u32 backend_id;
	__u32 is_reply;
	__u32 is_new; /* a new flow was admitted */
	__u32 egress; /* interface index */
	__u32 mtu;    /* what would have fitted */
};

/* What the journey knows on its way. */
struct journey {
	struct packet p;
	struct config *config;
	struct result *result;
	__u32 trial;
	__u32 untraced; /* a trial, or a quoted flow: changes no state */
};

LB_INLINE struct config *get_config(void)
{
	__u32 zero = 0;

	return LOOKUP(lb_config, &zero);
}

/* What is known of the destination address: 0 for nearly all that is not ours. */
LB_INLINE __u16 address_hint(struct packet *p, const int v6)
{
	__be32 *a = destination_of(p, v6);
	__u32 index = v6 ? hint_index6(a) : hint_index4(a[0]);
	__u32 line = index / LB_HINTS_PER_LINE;
	struct filter_line *f = LOOKUP(lb_filter, &line);

	return f ? f->hints[index % LB_HINTS_PER_LINE] : 0;
}

/* Id by (address, port, protocol); 0: none. The caller compares it with the record of that id. */
LB_INLINE __u32 find_id(const __be32 *address, __be16 port, __u8 protocol, const int v6)
{
	__u64 hash = index_hash(address, port, protocol, v6), *entry;
	__u32 at;

#pragma clang loop unroll(disable)
	for (int i = 0; i < LB_INDEX_PROBES; i++) {
		at = ((hash >> (64 - LB_INDEX_BITS)) + i) & ((1u << LB_INDEX_BITS) - 1);
		entry = LOOKUP(lb_index, &at);
		if (!entry || !*entry)
			return 0;
		if ((*entry ^ hash) >> 16 == 0)
			return (__u16)*entry;
	}
	return 0;
}

LB_INLINE struct vip *get_vip(__u32 id)
{
	return LOOKUP(lb_vips, &id);
}

LB_INLINE struct vip *find_vip(struct journey *j, const int v6)
{
	struct packet *p = &j->p;
	__u32 id = find_id(destination_of(p, v6), p->local_port, p->protocol, v6);
	struct vip *vip = get_vip(id);

	if (!id || !vip || vip->port != p->local_port || vip->protocol != p->protocol ||
	    !same_address(vip->address, destination_of(p, v6), v6))
		return 0;
	j->result->vip_id = id;
	return vip;
}

LB_INLINE int is_vip_address(struct packet *p, const int v6)
{
	__u32 id = find_id(destination_of(p, v6), 0, LB_KEY_VIP_ADDRESS, v6);
	struct vip *vip = get_vip(id);

	return id && vip && same_address(vip->address, destination_of(p, v6), v6);
}

/* The SNAT address that the packet is for, by the hint or, when two share it, by the index. */
LB_INLINE struct snat *find_snat(struct packet *p, __u16 hint, __u32 *id, const int v6)
{
	struct snat *snat;

	*id = (hint & LB_HINT_SNAT) - 1;
	snat = LOOKUP(lb_snats, id);
	if (snat && same_address(snat->address, destination_of(p, v6), v6))
		return snat;
	*id = find_id(destination_of(p, v6), 0, LB_KEY_SNAT, v6) - 1;
	snat = LOOKUP(lb_snats, id);
	if (snat && same_address(snat->address, destination_of(p, v6), v6))
		return snat;
	return 0;
}

LB_INLINE struct neighbour *get_backend(__u32 id)
{
	return LOOKUP(lb_backends, &id);
}

/* The machine that takes packets to the client: the one they came from, else the default. */
LB_INLINE struct neighbour *get_router(__u32 id, const int v6)
{
	struct neighbour *router = LOOKUP(lb_routers, &id);

	if (router && router->path & LB_PATH_USABLE)
		return router;
	id = v6 ? LB_ROUTER_DEFAULT6 : LB_ROUTER_DEFAULT4;
	return LOOKUP(lb_routers, &id);
}

LB_INLINE __u32 router_id_of(struct journey *j, const int v6)
{
	struct ethhdr *eth = j->p.start;
	struct router_key key = {.ifindex = j->p.ingress, .vlan = j->p.vlan};
	__u32 *id = 0;

	if ((void *)(eth + 1) <= j->p.end) {
		__builtin_memcpy(key.mac, eth->h_source, ETH_ALEN);
		id = LOOKUP(lb_router_ids, &key);
	}
	return id ? *id : v6 ? LB_ROUTER_DEFAULT6 : LB_ROUTER_DEFAULT4;
}

/* The backend that a ring gives to a hash; 0: nobody. */
LB_INLINE __u32 ring_backend(__u32 ring, __u64 hash)
{
	__u32 slot = ring_slot(hash);
	__u32 line = ring * LB_RING_LINES + 1 + slot / LB_SLOTS_PER_LINE;
	union ring_line *l = LOOKUP(lb_rings, &line);

	return l ? l->slots[slot % LB_SLOTS_PER_LINE] : 0;
}

/* May this backend keep its flows (or, `active`, get new ones) in this ring? */
LB_INLINE int ring_has(__u32 ring, __u32 backend, const int active)
{
	__u32 line = ring * LB_RING_LINES + 1 + LB_SLOT_LINES + (active ? LB_MEMBER_LINES : 0) +
		     backend / 512;
	union ring_line *l = LOOKUP(lb_rings, &line);

	return l && l->members[backend / 64 % 8] >> (backend % 64) & 1;
}

LB_INLINE struct counter *get_counter(__u32 id)
{
	__u32 index = bpf_get_smp_processor_id() * LB_COUNTERS + id;

	return LOOKUP(lb_counters, &index);
}

LB_INLINE __u32 now_ticks(void)
{
	return bpf_jiffies64() >> LB_TICK_SHIFT;
}

LB_INLINE struct scratch *get_scratch(void)
{
	__u32 zero = 0;

	return LOOKUP(lb_scratch, &zero);
}

/* One more of what is limited to `most` a tick? Counts by plain stores: a limit, not an account. */
LB_INLINE int spend(struct limit *limit, __u32 most, __u32 now)
{
	if (limit->tick != now) {
		limit->tick = now;
		limit->spent = 0;
	}
	if (limit->spent >= most)
		return 0;
	limit->spent++;
	return 1;
}

/* May this CPU write another answer in this tick? */
LB_INLINE int may_answer(struct journey *j)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct limit *limit = LOOKUP(lb_answers, &cpu);

	return limit && (j->trial || spend(limit, j->config->answers_per_tick, now_ticks()));
}

#endif
