/* SPDX-License-Identifier: GPL-2.0-only */
/* lbagent's data path: the journey of a packet through one LB host. Read it from the end.
 *
 *   parse -> is the address ours? -> reply of a backend? -> which VIP -> may the client? ->
 *   which backend -> rewrite or encapsulate -> leave by the one exit, counted by verdict
 *
 * This file owns all maps and every map access; the headers are pure. It is compiled by BCC as one
 * function: maps are created by the daemon and known here by number (FD_<map>), everything is
 * inlined, there are no globals. Not ours: XDP_PASS. Ours but broken: a named, counted drop.
 *
 * A packet that "arrives" on interface 1 (loopback, which can have no native XDP) is a trial: it
 * takes the whole journey but leaves no trace in flows or counters, and the return value tells
 * what was decided: action | verdict << 8 | backend << 16.
 */
#include "wire.h"
#include "verdict.h"
#include "layout.h"
#include "checksum.h"
#include "hash.h"
#include "packet.h"
#include "state.h"
#include "rewrite.h"
#include "tunnel.h"

#define TRIAL_IFINDEX 1

#define MAP(name) bpf_pseudo_fd(1, FD_##name)
#define LOOKUP(name, key) bpf_map_lookup_elem_(MAP(name), key)

/* What the journey has found out so far. */
struct journey {
	struct packet p;
	__u32 trial;
	__u32 vip_id;
	__u32 backend_id;
	__u32 is_reply;
	__u32 is_new; /* a new flow was admitted */
	__u32 egress; /* interface index */
};

/* ---- maps ------------------------------------------------------------------------------------ */

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

/* Id of the VIP (address, port, protocol), or with port and protocol 0 what the address is. */
LB_INLINE __u32 vip_id_of(const __be32 *address, __be16 port, __u8 protocol, const int v6)
{
	__u32 *id;

	if (v6) {
		struct vip_key6 key = {.port = port, .protocol = protocol};

		__builtin_memcpy(key.address, address, 16);
		id = LOOKUP(lb_vip_ids6, &key);
	} else {
		__u64 key = (__u64)address[0] << 32 | (__u32)port << 16 | protocol;

		id = LOOKUP(lb_vip_ids4, &key);
	}
	return id ? *id : 0;
}

LB_INLINE struct vip *get_vip(__u32 id)
{
	return LOOKUP(lb_vips, &id);
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
	__u32 *id;

	if ((void *)(eth + 1) > j->p.end)
		return 0;
	__builtin_memcpy(key.mac, eth->h_source, ETH_ALEN);
	id = LOOKUP(lb_router_ids, &key);
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

/* ---- choosing a backend ------------------------------------------------------------------------ */

/* Unpacked `target` of a VIP: read once, so that all of it is of one moment. */
struct target {
	__u16 ring;
	__be16 node_port;
	__u8 mode;
	__u8 flags;
	__u16 ranges;
};

LB_INLINE struct target read_target(const struct vip *vip)
{
	__u64 word = *(const volatile __u64 *)&vip->target;
	struct target t = {
		.ring = word,
		.node_port = word >> 16,
		.mode = word >> 32,
		.flags = word >> 40,
		.ranges = word >> 48,
	};

	return t;
}

/* The same on every LB host. With client affinity the port does not count. */
LB_INLINE __u64 ring_hash(struct journey *j, const struct vip *vip, __u64 seed, const int v6)
{
	__be32 *client = source_of(&j->p, v6);
	__u64 x = seed ^ ((__u64)vip->port << 32 | (__u32)vip->protocol << 16);

	if (!vip->affinity_ticks)
		x ^= j->p.source_port;
	if (v6)
		return mix(mix_address(client, mix_address(vip->address, x)));
	return mix(mix(x ^ (__u64)vip->address[0] << 16) ^ client[0]);
}

LB_INLINE __u32 choose_backend(struct journey *j, const struct config *config,
			       const struct vip *vip, const struct target *t, __u32 now, const int v6)
{
	struct client_key key = {.vip = j->vip_id, .generation = vip->salt};
	struct client *client, fresh = {};
	__u32 backend = ring_backend(t->ring, ring_hash(j, vip, config->seed, v6));

	if (!vip->affinity_ticks)
		return backend;
	if (v6)
		__builtin_memcpy(key.address, source_of(&j->p, v6), 16);
	else
		key.address[0] = *source_of(&j->p, v6);
	client = LOOKUP(lb_affinity, &key);
	if (client) {
		if (now - client->seen <= vip->affinity_ticks && ring_has(t->ring, client->backend, 1))
			backend = client->backend;
		if (!j->trial) {
			client->backend = backend;
			client->seen = now;
		}
	} else if (!j->trial) {
		fresh.seen = now;
		fresh.backend = backend;
		bpf_map_update_elem_(MAP(lb_affinity), &key, &fresh, BPF_ANY);
	}
	return backend;
}

LB_INLINE int source_allowed(struct packet *p, __u32 set, const int v6)
{
	if (v6) {
		struct range_key6 key = {.prefix_bits = 160, .set = set};

		__builtin_memcpy(key.address, source_of(p, v6), 16);
		return LOOKUP(lb_ranges6, &key) != 0;
	} else {
		struct range_key4 key = {.prefix_bits = 64, .set = set, .address = *source_of(p, v6)};

		return LOOKUP(lb_ranges4, &key) != 0;
	}
}

/* ---- leaving --------------------------------------------------------------------------------- */

/* Put the link header of the way to `n` in front, with room for `outer` more bytes behind it.
 * Packet pointers are void afterwards, but for p->start, p->end and p->l3 (unchecked).
 */
LB_INLINE int set_link(struct xdp_md *ctx, struct journey *j, const struct neighbour *n, __u32 path,
		       __be16 ethertype, __u32 outer)
{
	const struct hop *hop = &n->hops[path & LB_PATH_SECOND];
	struct packet *p = &j->p;
	__u32 link = ETH_HLEN;
	struct ethhdr *eth;

	if (hop->outer)
		link += hop->inner ? 8 : 4;
	if (link + outer != p->link) {
		if (bpf_xdp_adjust_head(ctx, (int)p->link - (int)(link + outer)))
			return -1;
		p->start = (void *)(long)ctx->data;
		p->end = (void *)(long)ctx->data_end;
	}
	eth = p->start;
	if ((void *)(eth + 1) + 8 > p->end)
		return -1;
	__builtin_memcpy(eth, hop->macs, 12);
	if (link == ETH_HLEN) {
		eth->h_proto = ethertype;
	} else {
		struct vlan_tag *tag = (void *)(eth + 1);

		eth->h_proto = hop->inner ? LB_BE16(ETH_P_8021AD) : LB_BE16(ETH_P_8021Q);
		tag->control = hop->outer;
		if (hop->inner) {
			tag->protocol = LB_BE16(ETH_P_8021Q);
			tag++;
			tag->control = hop->inner;
		}
		tag->protocol = ethertype;
	}
	p->link = link;
	p->l3 = p->start + link;
	j->egress = hop->ifindex;
	return 0;
}

/* ---- mode nat -------------------------------------------------------------------------------- */

LB_INLINE struct nat_bucket *get_bucket(__u32 index)
{
	return LOOKUP(lb_nat, &index);
}

/* Bucket of a hash, among the SNAT addresses of the family. */
LB_INLINE __u32 bucket_of(const struct config *config, __u64 hash, const int v6)
{
	__u32 first = v6 ? config->snats6_first : config->snats4_first;
	__u32 count = v6 ? config->snats6 : config->snats4;
	__u32 snat = first + (((hash & 0xffff) * count) >> 16);

	return (snat << LB_NAT_SHIFT) + (((hash >> 32) * config->nat_buckets) >> 32);
}

/* The words of an entry that name its client. */
struct nat_key {
	__u64 key, more;
	__u32 rest;
};

LB_INLINE struct nat_key nat_key_of(struct journey *j, const int v6)
{
	__be32 *client = source_of(&j->p, v6);
	struct nat_key k = {
		.key = (__u64)client[0] << 32 | (j->vip_id & 0xffff) << 16 | j->p.source_port,
	};

	if (v6) {
		k.more = (__u64)client[1] << 32 | client[2];
		k.rest = client[3];
	}
	return k;
}

LB_INLINE __u64 nat_hash(const struct nat_key *k, const struct vip *vip, const int v6)
{
	if (v6)
		return mix(mix(k->key ^ vip->salt) ^ k->more ^ (__u64)k->rest << 17);
	return mix(k->key ^ vip->salt);
}

LB_INLINE int nat_matches(const struct nat_entry *e, const struct nat_key *k, __u16 generation,
			  const int v6)
{
	if (e->key != k->key)
		return 0;
	if (v6 && (e->more != k->more || (__u32)e->where != k->rest))
		return 0;
	return nat_generation(e->life) == generation && nat_state(e->life) > LB_NAT_CLAIMED;
}

/* Slot of the flow in this bucket, -1 when it is not there. */
LB_INLINE int nat_find(const struct nat_bucket *b, const struct nat_key *k, __u16 generation,
		       const int v6)
{
#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++)
		if (nat_matches(&b->entries[i], k, generation, v6))
			return i;
	return -1;
}

LB_INLINE int nat_is_free(const struct config *config, __u64 life, __u32 now, int pressed)
{
	__u32 state = nat_state(life);

	return state == LB_NAT_FREE ||
	       nat_idle(life, now) >= (pressed ? config->pressure[state] : config->timeout[state]);
}

LB_INLINE int nat_count_free(const struct config *config, const struct nat_bucket *b, __u32 now)
{
	int free = 0;

#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++)
		free += nat_is_free(config, b->entries[i].life, now, 0);
	return free;
}

/* Claim a free slot of the bucket by compare-and-swap; -1: none. A live entry is never taken. */
LB_INLINE int nat_claim(const struct config *config, struct nat_bucket *b, __u16 generation,
			__u32 now, int pressed)
{
	__u64 life;

#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++) {
		life = b->entries[i].life;
		if (nat_is_free(config, life, now, pressed) &&
		    __sync_bool_compare_and_swap(&b->entries[i].life, life,
						 nat_life(LB_NAT_CLAIMED, generation, now)))
			return i;
	}
	return -1;
}

/* Send the packet on to the backend from the slot's address and port. */
LB_INLINE enum verdict nat_send(struct xdp_md *ctx, struct journey *j, const struct config *config,
				const struct target *t, __u32 bucket, __u32 way, const int v6)
{
	__u32 snat_id = bucket >> LB_NAT_SHIFT;
	__u32 slot = ((bucket & ((1u << LB_NAT_SHIFT) - 1)) << 2) + way;
	struct snat *snat = LOOKUP(lb_snats, &snat_id);
	struct neighbour *backend = get_backend(j->backend_id);
	__u64 change;
	__u32 path;

	if (!snat || !backend)
		return LB_NO_BACKEND;
	path = *(volatile __u32 *)&backend->path;
	if (!(path & LB_PATH_USABLE))
		return LB_NO_NEXTHOP;
	if (!decrement_ttl(&j->p, v6))
		return LB_TTL_EXPIRED;
	change = set_addresses(&j->p, snat->address, backend->address, v6);
	set_ports(&j->p, LB_BE16(config->port_first + slot), t->node_port, change);
	if (set_link(ctx, j, backend, path, j->p.ethertype, 0))
		return LB_NO_HEADROOM;
	return LB_NAT_FORWARD;
}

/* Give the flow a backend: a new flow, or one whose backend is gone or whose time was over. */
LB_INLINE __u32 nat_admit(struct journey *j, const struct config *config, const struct vip *vip,
			  const struct target *t, struct nat_entry *e, const struct nat_key *k,
			  __u32 now, const int v6)
{
	__u32 state = vip->protocol == IPPROTO_TCP ? LB_NAT_SYN : LB_NAT_UDP;

	e->key = k->key;
	e->more = k->more;
	e->where = (__u64)k->rest | (__u64)j->backend_id << 32 |
		   (__u64)router_id_of(j, v6) << 48;
	*(volatile __u64 *)&e->life = nat_life(state, vip->salt, now);
	j->is_new = 1;
	return state;
}

LB_INLINE enum verdict nat_forward(struct xdp_md *ctx, struct journey *j,
				   const struct config *config, const struct vip *vip,
				   const struct target *t, const int v6)
{
	__u16 generation = vip->salt;
	struct nat_key k = nat_key_of(j, v6);
	__u64 hash = nat_hash(&k, vip, v6), life, fresh;
	__u32 now = now_ticks(), state;
	__u32 bucket = bucket_of(config, hash, v6), other;
	struct nat_bucket *b = get_bucket(bucket), *b2;
	struct nat_entry *e;
	int way;

	if (!b)
		return LB_NAT_FULL;
	way = nat_find(b, &k, generation, v6);
	if (way < 0) {
		other = bucket_of(config, second_hash(hash), v6);
		b2 = get_bucket(other);
		if (!b2)
			return LB_NAT_FULL;
		way = nat_find(b2, &k, generation, v6);
		if (way < 0)
			goto new_flow;
		b = b2;
		bucket = other;
	}
	e = &b->entries[way & (LB_NAT_WAYS - 1)];
	life = *(volatile __u64 *)&e->life;
	state = nat_state(life);
	j->backend_id = (__u16)(e->where >> 32);
	if (!ring_has(t->ring, j->backend_id, 0) || (is_syn(&j->p) && state == LB_NAT_CLOSED) ||
	    (state == LB_NAT_UDP_STREAM && nat_idle(life, now) >= config->timeout[LB_NAT_UDP_STREAM])) {
		j->backend_id = choose_backend(j, config, vip, t, now, v6);
		if (!j->backend_id)
			return LB_NO_BACKEND;
		if (!j->trial)
			nat_admit(j, config, vip, t, e, &k, now, v6);
		return nat_send(ctx, j, config, t, bucket, way, v6);
	}
	fresh = nat_life(nat_state_after_client(state, j->p.tcp_flags), generation, now);
	if (fresh != life && !j->trial)
		__sync_bool_compare_and_swap(&e->life, life, fresh);
	return nat_send(ctx, j, config, t, bucket, way, v6);

new_flow:
	if (j->p.protocol == IPPROTO_TCP && !is_syn(&j->p))
		return LB_NO_FLOW; /* the backend knows nothing of it either */
	j->backend_id = choose_backend(j, config, vip, t, now, v6);
	if (!j->backend_id)
		return LB_NO_BACKEND;
	if (j->trial)
		return nat_send(ctx, j, config, t, bucket, 0, v6);
	if (nat_count_free(config, b2, now) > nat_count_free(config, b, now)) {
		struct nat_bucket *swap = b;

		b = b2;
		b2 = swap;
		state = bucket;
		bucket = other;
		other = state;
	}
	way = nat_claim(config, b, generation, now, 0);
	if (way < 0)
		way = nat_claim(config, b, generation, now, 1);
	if (way < 0) {
		way = nat_claim(config, b2, generation, now, 1);
		if (way < 0)
			return LB_NAT_FULL;
		b = b2;
		bucket = other;
	}
	e = &b->entries[way & (LB_NAT_WAYS - 1)];
	nat_admit(j, config, vip, t, e, &k, now, v6);
	return nat_send(ctx, j, config, t, bucket, way, v6);
}

/* A packet to a SNAT address: a backend's reply when it fits the slot that its port names. */
LB_INLINE enum verdict nat_reply(struct xdp_md *ctx, struct journey *j, const struct config *config,
				 __u32 snat_id, const int v6)
{
	struct snat *snat = LOOKUP(lb_snats, &snat_id);
	struct neighbour *backend, *router;
	struct nat_bucket *b;
	struct nat_entry *e;
	struct vip *vip;
	struct target t;
	__be32 client[4];
	__u64 life, fresh, change;
	__u32 slot, now, path;

	if (!snat || !same_address(snat->address, destination_of(&j->p, v6), v6))
		return LB_CONTINUE;
	slot = LB_HOST16(j->p.destination_port) - config->port_first;
	if (slot >= (__u32)config->nat_buckets * LB_NAT_WAYS)
		return LB_NO_SLOT;
	b = get_bucket((snat_id << LB_NAT_SHIFT) + slot / LB_NAT_WAYS);
	if (!b)
		return LB_NO_SLOT;
	e = &b->entries[slot % LB_NAT_WAYS];
	life = *(volatile __u64 *)&e->life;
	vip = get_vip((__u16)(e->key >> 16));
	backend = get_backend((__u16)(e->where >> 32));
	if (!vip || !backend || nat_state(life) <= LB_NAT_CLAIMED ||
	    nat_generation(life) != (__u16)vip->salt || vip->protocol != j->p.protocol)
		return LB_NO_SLOT;
	t = read_target(vip);
	if (t.node_port != j->p.source_port ||
	    !same_address(backend->address, source_of(&j->p, v6), v6))
		return LB_NO_SLOT;
	j->vip_id = (__u16)(e->key >> 16);
	j->backend_id = (__u16)(e->where >> 32);
	j->is_reply = 1;
	router = get_router(e->where >> 48, v6);
	path = router ? *(volatile __u32 *)&router->path : 0;
	if (!(path & LB_PATH_USABLE))
		return LB_NO_NEXTHOP;
	if (!decrement_ttl(&j->p, v6))
		return LB_TTL_EXPIRED;
	now = now_ticks();
	fresh = nat_life(nat_state_after_backend(nat_state(life), j->p.tcp_flags),
			 nat_generation(life), now);
	if (fresh != life && !j->trial)
		__sync_bool_compare_and_swap(&e->life, life, fresh);
	client[0] = e->key >> 32;
	client[1] = e->more >> 32;
	client[2] = e->more;
	client[3] = e->where;
	change = set_addresses(&j->p, vip->address, client, v6);
	set_ports(&j->p, vip->port, (__be16)e->key, change);
	if (set_link(ctx, j, router, path, j->p.ethertype, 0))
		return LB_NO_HEADROOM;
	return LB_NAT_REPLY;
}

/* ---- the DSR modes --------------------------------------------------------------------------- */

#define FLOW_AGE(e) ((__u32)((e) >> 16) & 0xfff)
#define FLOW_STAGE(e) ((__u32)((e) >> 28) & 3)
#define FLOW_TAG(e) ((e) & ~0x3fffffffull)

enum flow_stage { FLOW_ONCE, FLOW_AGAIN, FLOW_CLOSING };

LB_INLINE __u64 flow_entry(__u64 tag, __u32 stage, __u32 age, __u32 backend)
{
	return tag | (__u64)stage << 28 | (age & 0xfff) << 16 | backend;
}

/* Whom to push out of a full line: nobody, else a closing flow, else one seen once, else the
 * oldest. So what a flood of single packets pushes out are other such packets' flows.
 */
LB_INLINE __u32 flow_victim(const struct flow_line *line, __u32 now)
{
	__u32 victim = 0, best = 0;

#pragma unroll
	for (int i = 0; i < 8; i++) {
		__u64 e = line->flows[i];
		__u32 idle = (now - FLOW_AGE(e)) & 0xfff, worth;

		if (!e)
			worth = 0x8000;
		else
			worth = (FLOW_STAGE(e) == FLOW_AGAIN  ? 0
				 : FLOW_STAGE(e) == FLOW_ONCE ? 0x1000
							      : 0x2000) +
				idle + 1;
		if (worth > best) {
			best = worth;
			victim = i;
		}
	}
	return victim;
}

LB_INLINE __u32 flow_next_stage(__u32 stage, __u8 tcp_flags)
{
	return tcp_flags & (LB_TCP_FIN | LB_TCP_RST) ? FLOW_CLOSING : stage == FLOW_CLOSING ? stage
											  : FLOW_AGAIN;
}

/* The backend of a DSR flow: the one it has, else the ring's, remembered from the first packet
 * after the SYN on. Until then the ring gives the same answer, so a flood of SYNs writes nothing.
 */
LB_INLINE __u32 flow_backend(struct journey *j, const struct config *config, const struct vip *vip,
			     const struct target *t, const int v6)
{
	struct nat_key k = nat_key_of(j, v6);
	__u64 hash = nat_hash(&k, vip, v6), tag = FLOW_TAG(hash), e, fresh;
	__u32 index = hash & (LB_FLOW_LINES - 1), now = now_ticks(), backend, victim;
	struct flow_line *line;

	if (is_syn(&j->p)) {
		j->is_new = 1;
		return choose_backend(j, config, vip, t, now, v6);
	}
	line = LOOKUP(lb_flows, &index);
	if (!line)
		return 0;
#pragma unroll
	for (int i = 0; i < 8; i++) {
		e = line->flows[i];
		if (FLOW_TAG(e) != tag)
			continue;
		victim = i;
		backend = (__u16)e;
		if (!backend || !ring_has(t->ring, backend, 0) ||
		    (j->p.protocol == IPPROTO_UDP &&
		     ((now - FLOW_AGE(e)) & 0xfff) > config->udp_ticks))
			goto choose;
		fresh = flow_entry(tag, flow_next_stage(FLOW_STAGE(e), j->p.tcp_flags), now, backend);
		if (fresh != e && !j->trial)
			line->flows[i] = fresh;
		return backend;
	}
	victim = flow_victim(line, now);
choose:
	backend = choose_backend(j, config, vip, t, now, v6);
	if (backend && !j->trial)
		line->flows[victim & 7] = flow_entry(tag, FLOW_ONCE, now, backend);
	if (j->p.protocol == IPPROTO_UDP)
		j->is_new = 1;
	return backend;
}

LB_INLINE enum verdict dsr_forward(struct xdp_md *ctx, struct journey *j,
				   const struct config *config, const struct vip *vip,
				   const struct target *t, const int v6)
{
	struct neighbour *backend;
	struct packet *p = &j->p;
	__u32 path, outer;

	j->backend_id = flow_backend(j, config, vip, t, v6);
	backend = get_backend(j->backend_id);
	if (!j->backend_id || !backend)
		return LB_NO_BACKEND;
	path = *(volatile __u32 *)&backend->path;
	if (!(path & LB_PATH_USABLE))
		return LB_NO_NEXTHOP;
	if (!decrement_ttl(p, v6))
		return LB_TTL_EXPIRED;
	if (t->mode == LB_MODE_DSR_L2) {
		if (set_link(ctx, j, backend, path, p->ethertype, 0))
			return LB_NO_HEADROOM;
		return LB_DSR_L2;
	}
	outer = backend->family == 6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	if (p->bytes + outer > path >> LB_PATH_MTU_SHIFT)
		return LB_TOO_BIG;
	struct tunnel tunnel = {
		.bytes = p->bytes,
		.spread = *(source_of(p, v6) + (v6 ? 3 : 0)) ^ (__u32)p->source_port << 16,
		.protocol = v6 ? IPPROTO_IPV6 : IPPROTO_IPIP,
		.class = v6 ? traffic_class6(p->l3) : ((struct iphdr *)p->l3)->tos,
	};
	if (backend->family == 6) {
		if (set_link(ctx, j, backend, path, LB_BE16(ETH_P_IPV6), sizeof(struct ipv6hdr)) ||
		    write_tunnel6(p->l3, p->end, &tunnel, config, backend->address))
			return LB_NO_HEADROOM;
	} else {
		if (set_link(ctx, j, backend, path, LB_BE16(ETH_P_IP), sizeof(struct iphdr)) ||
		    write_tunnel4(p->l3, p->end, &tunnel, config, backend->address))
			return LB_NO_HEADROOM;
	}
	return LB_DSR_IPIP;
}

/* ---- the journey ----------------------------------------------------------------------------- */

/* Not a plain TCP or UDP packet, or to a VIP without that port. */
LB_INLINE enum verdict odd_packet(struct xdp_md *ctx, struct journey *j, const int v6)
{
	if (!(vip_id_of(destination_of(&j->p, v6), 0, 0, v6) & LB_ADDRESS_IS_VIP))
		return LB_NOT_OURS;
	switch (j->p.oddity) {
	case LB_PLAIN:
		return LB_NO_PORT;
	case LB_HAS_OPTIONS:
		return LB_IP_OPTIONS;
	case LB_HAS_EXTENSION:
		return LB_EXTENSION_HEADER;
	case LB_FIRST_FRAGMENT:
	case LB_LATER_FRAGMENT:
		return LB_FRAGMENT_LOST;
	case LB_IS_ICMP:
	case LB_OTHER_PROTOCOL:
		return LB_PROTOCOL;
	default:
		return LB_MALFORMED;
	}
}

LB_INLINE enum verdict journey(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct config *config;
	struct vip *vip;
	struct target t;
	enum verdict v;
	__u32 id, snat_id;
	__u16 hint;

	if (v6 ? parse_ip6(&j->p) : parse_ip4(&j->p))
		return LB_NOT_OURS;
	hint = address_hint(&j->p, v6);
	if (!hint)
		return LB_NOT_OURS;
	if (j->p.oddity == LB_PLAIN)
		parse_l4(&j->p);
	if (j->p.oddity != LB_PLAIN)
		return odd_packet(ctx, j, v6);
	config = get_config();
	if (!config)
		return LB_NOT_OURS;
	if (hint & LB_HINT_SNAT) {
		v = nat_reply(ctx, j, config, (hint & LB_HINT_SNAT) - 1, v6);
		if (v != LB_CONTINUE)
			return v;
	}
	id = vip_id_of(destination_of(&j->p, v6), j->p.destination_port, j->p.protocol, v6);
	if (!id) {
		id = vip_id_of(destination_of(&j->p, v6), 0, 0, v6);
		if (!(id & LB_ADDRESS_IS_SNAT))
			return odd_packet(ctx, j, v6);
		snat_id = id & 0xffff; /* two addresses share a hint, and it names the other one */
		v = nat_reply(ctx, j, config, snat_id, v6);
		return v == LB_CONTINUE ? LB_NO_SLOT : v;
	}
	vip = get_vip(id);
	if (!vip)
		return LB_NOT_OURS;
	j->vip_id = id;
	t = read_target(vip);
	if (t.ranges && !source_allowed(&j->p, t.ranges, v6))
		return LB_SOURCE_DENIED;
	if (t.mode == LB_MODE_NAT)
		return nat_forward(ctx, j, config, vip, &t, v6);
	return dsr_forward(ctx, j, config, vip, &t, v6);
}

LB_INLINE void count(struct journey *j, enum verdict v)
{
	struct counter *c = get_counter(v);

	if (c) {
		c->packets++;
		c->bytes += j->p.bytes;
	}
	if (!j->vip_id)
		return;
	c = get_counter(LB_COUNTER_VERDICTS + j->vip_id);
	if (c) {
		if (v > LB_LAST_ANSWER) {
			c->drops++;
		} else if (j->is_reply) {
			c->replies++;
			c->reply_bytes += j->p.bytes;
		} else {
			c->packets++;
			c->bytes += j->p.bytes;
		}
		c->flows += j->is_new;
	}
	if (!j->backend_id)
		return;
	c = get_counter(LB_COUNTER_VERDICTS + LB_VIPS + j->backend_id);
	if (c) {
		if (v > LB_LAST_ANSWER) {
			c->drops++;
		} else if (j->is_reply) {
			c->replies++;
			c->reply_bytes += j->p.bytes;
		} else {
			c->packets++;
			c->bytes += j->p.bytes;
		}
		c->flows += j->is_new;
	}
}

/* The one exit: count the verdict and make it an action. */
LB_INLINE int leave(struct journey *j, enum verdict v)
{
	int action = XDP_DROP;

	if (v <= LB_LAST_PASS)
		action = XDP_PASS;
	else if (v <= LB_LAST_ANSWER)
		action = j->egress == j->p.ingress ? XDP_TX : XDP_REDIRECT;
	if (j->trial)
		return action | v << 8 | j->backend_id << 16;
	count(j, v);
	return action == XDP_REDIRECT ? bpf_redirect(j->egress, 0) : action;
}

int lb(struct xdp_md *ctx)
{
	struct journey j = {};
	enum verdict v;

	j.p.ingress = ctx->ingress_ifindex;
	j.trial = j.p.ingress == TRIAL_IFINDEX;
	parse_link(&j.p, (void *)(long)ctx->data, (void *)(long)ctx->data_end);
	if (j.p.ethertype == LB_BE16(ETH_P_IP))
		v = journey(ctx, &j, 0);
	else if (j.p.ethertype == LB_BE16(ETH_P_IPV6))
		v = journey(ctx, &j, 1);
	else
		v = LB_NOT_IP;
	return leave(&j, v);
}
