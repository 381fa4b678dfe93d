/* SPDX-License-Identifier: GPL-2.0-only */
/* lbagent's data path: the journey of a packet through one LB host. Read it from the end.
 *
 *   parse -> is the address ours? -> reply of a backend? -> which VIP -> may the client? ->
 *   which backend -> rewrite or encapsulate -> answer, if something was wrong -> the one exit
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
#include "answer.h"

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

/* ---- choosing a backend ---------------------------------------------------------------------- */

/* Unpacked `target` of a VIP: read once, so that all of it is of one moment. */
struct target {
	__u16 ring;
	__be16 node_port;
	__u8 mode;
	__u16 ranges;
};

LB_INLINE struct target read_target(const struct vip *vip)
{
	__u64 word = ONCE(vip->target);
	struct target t = {
		.ring = word,
		.node_port = word >> 16,
		.mode = word >> 32,
		.ranges = word >> 48,
	};

	return t;
}

LB_INLINE int source_allowed(struct packet *p, __u32 set, const int v6)
{
	if (v6) {
		struct range_key6 key = {.prefix_bits = 160, .set = set};

		copy_address(key.address, p->remote, v6);
		return LOOKUP(lb_ranges6, &key) != 0;
	} else {
		struct range_key4 key = {.prefix_bits = 64, .set = set, .address = p->remote[0]};

		return LOOKUP(lb_ranges4, &key) != 0;
	}
}

LB_INLINE int new_flow_allowed(struct journey *j, const struct vip *vip, __u32 now, const int v6)
{
	struct limit_key key = {.vip = j->result->vip_id};
	struct limit *limit, first = {.tick = now, .spent = 1};

	if (!vip->new_flows_per_tick || j->untraced)
		return 1;
	key.prefix[0] = j->p.remote[0];
	if (v6)
		key.prefix[1] = j->p.remote[1] & LB_BE32(0xffffff00);
	else
		key.prefix[0] &= LB_BE32(0xffffff00);
	limit = LOOKUP(lb_limits, &key);
	if (limit)
		return spend(limit, vip->new_flows_per_tick, now);
	bpf_map_update_elem_(MAP(lb_limits), &key, &first, BPF_ANY);
	return 1;
}

/* The same on every LB host, so it knows neither ids nor salts. With affinity no port counts. */
LB_INLINE __u64 ring_hash(struct journey *j, const struct vip *vip, const int v6)
{
	__u64 x = j->config->seed ^ ((__u64)vip->port << 32 | (__u32)vip->protocol << 16);

	if (!vip->affinity_ticks)
		x ^= j->p.remote_port;
	if (v6)
		return mix(mix_address(j->p.remote, mix_address(vip->address, x)));
	return mix(mix(x ^ (__u64)vip->address[0] << 16) ^ j->p.remote[0]);
}

/* With client affinity: the backend this client had last, as long as it takes new flows. */
LB_INLINE __u32 backend_of_client(struct journey *j, const struct vip *vip, const struct target *t,
				  __u32 backend, __u32 now, const int v6)
{
	struct client_key key = {.vip = j->result->vip_id, .generation = vip->salt};
	struct client *client, first = {.seen = now, .backend = backend};

	copy_address(key.address, j->p.remote, v6);
	client = LOOKUP(lb_affinity, &key);
	if (client) {
		if (now - client->seen <= vip->affinity_ticks &&
		    ring_has(t->ring, client->backend, 1))
			backend = client->backend;
		if (!j->untraced) {
			client->backend = backend;
			client->seen = now;
		}
	} else if (!j->untraced) {
		bpf_map_update_elem_(MAP(lb_affinity), &key, &first, BPF_ANY);
	}
	return backend;
}

/* A backend for a new flow, or the verdict why there is none. */
LB_INLINE enum verdict choose_backend(struct journey *j, const struct vip *vip,
				      const struct target *t, __u32 now, const int v6)
{
	if (!new_flow_allowed(j, vip, now, v6))
		return LB_NEW_FLOW_LIMIT;
	j->result->backend_id = ring_backend(t->ring, ring_hash(j, vip, v6));
	if (!j->result->backend_id)
		return LB_NO_BACKEND;
	if (vip->affinity_ticks)
		j->result->backend_id =
			backend_of_client(j, vip, t, j->result->backend_id, now, v6);
	return LB_CONTINUE;
}

/* ---- leaving --------------------------------------------------------------------------------- */

/* May the packet go this way, with so many bytes more? */
LB_INLINE enum verdict may_leave(struct journey *j, __u32 path, __u32 more, const int v6)
{
	if (!(path & LB_PATH_USABLE))
		return LB_NO_NEXTHOP;
	if (ttl_is_over(&j->p, v6))
		return LB_TTL_EXPIRED;
	j->result->mtu = (path >> LB_PATH_MTU_SHIFT) - more;
	if (j->p.bytes + more > path >> LB_PATH_MTU_SHIFT)
		return LB_TOO_BIG;
	return LB_CONTINUE;
}

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
	link = lb_forget(link, hop->ifindex, 31);
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
	LB_KEEP(p->l3);
	j->result->egress = hop->ifindex;
	return 0;
}

/* ---- fragments: the first one decides, the others follow ---------------------------------------
 */

LB_INLINE int fragment_key_of(struct packet *p, struct fragment_key *key, const int v6)
{
	struct fragment6 *f = p->l3 + sizeof(struct ipv6hdr);

	__builtin_memset(key, 0, sizeof(*key));
	copy_address(key->source, source_of(p, v6), v6);
	copy_address(key->destination, destination_of(p, v6), v6);
	key->protocol = p->protocol;
	if (!v6)
		key->id = ((struct iphdr *)p->l3)->id;
	else if ((void *)(f + 1) <= p->end)
		key->id = f->id;
	else
		return -1;
	return 0;
}

/* Called before the packet changes; `new` are the addresses it gets, 0 in the DSR modes. */
LB_INLINE void remember_fragment(struct journey *j, const struct ends *new, __u8 mode, __u16 router,
				 const int v6)
{
	struct scratch *s;
	struct fragment *f;

	if (j->p.shape != LB_FIRST_FRAGMENT || j->untraced)
		return;
	s = get_scratch();
	if (!s || fragment_key_of(&j->p, &s->fragment_key, v6))
		return;
	f = &s->fragment;
	f->seen = now_ticks();
	f->vip = j->result->vip_id;
	f->backend = j->result->backend_id;
	f->router = router;
	f->mode = mode;
	f->is_reply = j->result->is_reply;
	if (new) {
		copy_address(f->source, new->source, v6);
		copy_address(f->destination, new->destination, v6);
	}
	bpf_map_update_elem_(MAP(lb_fragments), &s->fragment_key, f, BPF_ANY);
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
struct flow_key {
	__u64 key, more;
	__u32 rest;
};

LB_INLINE struct flow_key flow_key_of(struct journey *j, const int v6)
{
	__be32 *client = j->p.remote;
	struct flow_key k = {
		.key = (__u64)client[0] << 32 | (j->result->vip_id & 0xffff) << 16 |
		       j->p.remote_port,
	};

	if (v6) {
		k.more = (__u64)client[1] << 32 | client[2];
		k.rest = client[3];
	}
	return k;
}

/* Finds a flow in this host's tables. The salt is the VIP's own, and new with every new VIP. */
LB_INLINE __u64 flow_hash(const struct flow_key *k, const struct vip *vip, const int v6)
{
	if (v6)
		return mix(mix(k->key ^ vip->salt) ^ k->more ^ (__u64)k->rest << 17);
	return mix(k->key ^ vip->salt);
}

/* Slot of the flow in this bucket, -1 when it is not there. */
LB_INLINE int nat_find(const struct nat_bucket *b, const struct flow_key *k, __u16 generation,
		       const int v6)
{
	const struct nat_entry *e;

#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++) {
		e = &b->entries[i];
		if (e->key != k->key)
			continue;
		if (v6 && (e->more != k->more || (__u32)e->where != k->rest))
			continue;
		if (nat_generation(e->life) == generation && nat_state(e->life) > LB_NAT_CLAIMED)
			return i;
	}
	return -1;
}

LB_INLINE int nat_is_free(const struct config *config, __u64 life, __u32 now, int pressed)
{
	__u32 state = nat_state(life);

	return nat_idle(life, now) > (pressed ? config->pressure[state] : config->timeout[state]);
}

/* Branch-free, for the verifier's sake: 1 for each slot that is free. */
LB_INLINE __u32 nat_count_free(const struct config *config, const struct nat_bucket *b, __u32 now)
{
	__u64 left, free = 0;

#pragma unroll
	for (int i = 0; i < LB_NAT_WAYS; i++) {
		left = (__u64)config->timeout[nat_state(b->entries[i].life)] -
		       nat_idle(b->entries[i].life, now);
		asm volatile("%0 >>= 63" : "+r"(left));
		free += left;
	}
	return free;
}

/* Claim a slot by compare-and-swap: one that is free in `b`, else one that may be taken under
 * pressure in `b` or `b2`. -> way, + LB_NAT_WAYS when in b2; -1: all are live, and stay so.
 */
LB_INLINE int nat_claim(const struct config *config, struct nat_bucket *b, struct nat_bucket *b2,
			__u16 generation, __u32 now)
{
	struct nat_entry *e;
	__u64 life;

#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < 3 * LB_NAT_WAYS; i++) {
		e = i < 2 * LB_NAT_WAYS ? &b->entries[i % LB_NAT_WAYS]
					: &b2->entries[i % LB_NAT_WAYS];
		life = e->life;
		if (nat_is_free(config, life, now, i >= LB_NAT_WAYS) &&
		    __sync_bool_compare_and_swap(&e->life, life,
						 nat_life(LB_NAT_CLAIMED, generation, now)))
			return i < 2 * LB_NAT_WAYS ? i % LB_NAT_WAYS : i - LB_NAT_WAYS;
	}
	return -1;
}

/* Fill a slot that is ours: a new flow, or one whose backend is gone or whose time was over. */
LB_INLINE void nat_admit(struct journey *j, const struct vip *vip, struct nat_entry *e,
			 const struct flow_key *k, __u32 now, const int v6)
{
	__u32 state = vip->protocol == IPPROTO_TCP ? LB_NAT_SYN : LB_NAT_UDP;

	e->key = k->key;
	e->more = k->more;
	e->where = (__u64)k->rest | (__u64)j->result->backend_id << 32 |
		   (__u64)router_id_of(j, v6) << 48;
	*(volatile __u64 *)&e->life = nat_life(state, vip->salt, now);
}

/* Does the flow keep its backend? */
LB_INLINE int nat_stays(struct journey *j, const struct target *t, __u64 life, __u32 now)
{
	__u32 state = nat_state(life);

	if (!ring_has(t->ring, j->result->backend_id, 0))
		return 0;
	if (state >= LB_NAT_UDP)
		return nat_idle(life, now) <= j->config->timeout[state];
	return state != LB_NAT_CLOSED || !is_syn(&j->p);
}

LB_INLINE void nat_touch(struct journey *j, struct nat_entry *e, __u64 life, __u32 state, __u32 now)
{
	__u64 fresh = nat_life(state, nat_generation(life), now);

	if (fresh != life && !j->untraced)
		__sync_bool_compare_and_swap(&e->life, life, fresh);
}

/* Send the packet on to its backend from the slot's address and port. */
LB_INLINE enum verdict nat_send(struct xdp_md *ctx, struct journey *j, const struct target *t,
				__u32 bucket, __u32 way, const int v6)
{
	__u32 snat_id = bucket >> LB_NAT_SHIFT;
	__u32 slot = ((bucket & ((1u << LB_NAT_SHIFT) - 1)) << 2) + way;
	struct snat *snat = LOOKUP(lb_snats, &snat_id);
	struct neighbour *backend = get_backend(j->result->backend_id);
	enum verdict v;
	__u32 path;

	if (!snat || !backend)
		return LB_NO_BACKEND;
	struct ends ends = {
		.source = snat->address,
		.destination = backend->address,
		.source_port = LB_BE16(j->config->port_first + slot),
		.destination_port = t->node_port,
	};

	path = ONCE(backend->path);
	v = may_leave(j, path, 0, v6);
	if (v != LB_CONTINUE)
		return v;
	remember_fragment(j, &ends, LB_MODE_NAT, 0, v6);
	decrement_ttl(&j->p, v6);
	rewrite_ends(&j->p, &ends, v6);
	if (set_link(ctx, j, backend, path, j->p.ethertype, 0))
		return LB_NO_HEADROOM;
	return j->p.shape == LB_QUOTE ? LB_ICMP_TO_BACKEND : LB_NAT_FORWARD;
}

LB_INLINE enum verdict nat_forward(struct xdp_md *ctx, struct journey *j, const struct vip *vip,
				   const struct target *t, const int v6)
{
	const struct config *config = j->config;
	struct flow_key k = flow_key_of(j, v6);
	__u64 hash = flow_hash(&k, vip, v6), life;
	__u32 now = now_ticks(), at = bucket_of(config, hash, v6), at2 = 0;
	struct nat_bucket *b = get_bucket(at), *b2 = b;
	struct nat_entry *e;
	enum verdict v;
	int way;

	if (!b || !b2)
		return LB_NAT_FULL;
	way = nat_find(b, &k, vip->salt, v6);
	if (way < 0) {
		at2 = bucket_of(config, second_hash(hash), v6);
		b2 = get_bucket(at2);
		if (!b2)
			return LB_NAT_FULL;
		way = nat_find(b2, &k, vip->salt, v6);
		if (way >= 0) {
			at = at2;
			b = b2;
		}
	}
	if (way >= 0) {
		way = lb_forget(way, hash, LB_NAT_WAYS - 1);
		e = &b->entries[way];
		life = ONCE(e->life);
		j->result->backend_id = (__u16)(e->where >> 32);
		if (nat_stays(j, t, life, now)) {
			nat_touch(j, e, life,
				  nat_state_after_client(nat_state(life), j->p.tcp_flags), now);
			goto send;
		}
	}
	if (j->p.shape == LB_QUOTE)
		return LB_ICMP_UNMATCHED;
	if (way < 0 && j->p.protocol == IPPROTO_TCP && !is_syn(&j->p))
		return LB_NO_FLOW; /* the backend knows nothing of it either */
	v = choose_backend(j, vip, t, now, v6);
	if (v != LB_CONTINUE)
		return v;
	if (j->untraced) {
		way = way < 0 ? 0 : way;
		goto send;
	}
	if (way < 0) {
		if (nat_count_free(config, b2, now) > nat_count_free(config, b, now)) {
			struct nat_bucket *b_ = b;
			__u32 at_ = at;

			b = b2;
			b2 = b_;
			at = at2;
			at2 = at_;
		}
		way = nat_claim(config, b, b2, vip->salt, now);
		if (way < 0)
			return LB_NAT_FULL;
		if (way >= LB_NAT_WAYS) {
			b = b2;
			at = at2;
		}
		way = lb_forget(way, hash, LB_NAT_WAYS - 1);
	}
	nat_admit(j, vip, &b->entries[(__u32)way % LB_NAT_WAYS], &k, now, v6);
	j->result->is_new = 1;
send:
	return nat_send(ctx, j, t, at, (__u32)way % LB_NAT_WAYS, v6);
}

/* A packet to a SNAT address: a backend's reply when it fits the slot that its port names. */
LB_INLINE enum verdict nat_reply(struct xdp_md *ctx, struct journey *j, __u32 snat_id, const int v6)
{
	struct packet *p = &j->p;
	__u32 slot = LB_HOST16(p->local_port) - j->config->port_first, path;
	struct neighbour *backend, *router;
	struct nat_bucket *b;
	struct nat_entry *e;
	struct vip *vip;
	enum verdict v;
	__be32 client[4];
	__u64 life;

	if (slot >= (__u32)j->config->nat_buckets * LB_NAT_WAYS)
		return LB_NO_SLOT;
	b = get_bucket((snat_id << LB_NAT_SHIFT) + slot / LB_NAT_WAYS);
	if (!b)
		return LB_NO_SLOT;
	e = &b->entries[slot % LB_NAT_WAYS];
	life = ONCE(e->life);
	vip = get_vip((__u16)(e->key >> 16));
	backend = get_backend((__u16)(e->where >> 32));
	if (!vip || !backend || nat_state(life) <= LB_NAT_CLAIMED ||
	    nat_generation(life) != (__u16)vip->salt || vip->protocol != p->protocol ||
	    read_target(vip).node_port != p->remote_port ||
	    !same_address(backend->address, p->remote, v6))
		return LB_NO_SLOT;
	j->result->vip_id = (__u16)(e->key >> 16);
	j->result->backend_id = (__u16)(e->where >> 32);
	j->result->is_reply = 1;
	router = get_router(e->where >> 48, v6);
	if (!router)
		return LB_NO_NEXTHOP;
	path = ONCE(router->path);
	v = may_leave(j, path, 0, v6);
	if (v != LB_CONTINUE)
		return v;
	nat_touch(j, e, life, nat_state_after_backend(nat_state(life), p->tcp_flags), now_ticks());
	client[0] = e->key >> 32;
	client[1] = e->more >> 32;
	client[2] = e->more;
	client[3] = e->where;
	struct ends ends = {
		.source = vip->address,
		.destination = client,
		.source_port = vip->port,
		.destination_port = (__be16)e->key,
	};

	remember_fragment(j, &ends, LB_MODE_NAT, e->where >> 48, v6);
	decrement_ttl(p, v6);
	rewrite_ends(p, &ends, v6);
	if (set_link(ctx, j, router, path, p->ethertype, 0))
		return LB_NO_HEADROOM;
	return p->shape == LB_QUOTE ? LB_ICMP_TO_CLIENT : LB_NAT_REPLY;
}

/* ---- the DSR modes --------------------------------------------------------------------------- */

#define FLOW_AGE(e)	  ((__u32)((e) >> 16) & 0xfff)
#define FLOW_STAGE(e)	  ((__u32)((e) >> 28) & 3)
#define FLOW_TAG(e)	  ((e) & ~0x3fffffffull)
#define FLOW_IDLE(e, now) (((now) - FLOW_AGE(e)) & 0xfff)

enum flow_stage { FLOW_AGAIN, FLOW_ONCE, FLOW_CLOSING }; /* the higher, the less it is missed */

LB_INLINE __u64 flow_entry(__u64 tag, __u32 stage, __u32 now, __u32 backend)
{
	return tag | (__u64)stage << 28 | (now & 0xfff) << 16 | backend;
}

/* Place of the flow in its line, -1 when it is not there. */
LB_INLINE int flow_find(const struct flow_line *line, __u64 tag)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		if (FLOW_TAG(line->flows[i]) == tag)
			return i;
	return -1;
}

/* Whom to push out of a full line: nobody, else a closing flow, else one seen once, else the
 * oldest. So what a flood of single packets pushes out are other such packets' flows. Without a
 * branch: 8 entries of 3 stages would be too many paths for the verifier.
 */
LB_INLINE __u32 flow_victim(const struct flow_line *line, __u32 now)
{
	__s64 best = 0, worth, less;
	__u64 e;

#pragma unroll
	for (int i = 0; i < 8; i++) {
		e = line->flows[i];
		worth = ((~e & (e - 1)) >> 63) << 18; /* empty */
		worth |= FLOW_STAGE(e) << 15 | FLOW_IDLE(e, now) << 3 | i;
		less = best - worth;
		asm volatile("%0 s>>= 63" : "+r"(less));
		best ^= (best ^ worth) & less;
	}
	return best & 7;
}

LB_INLINE int flow_stays(struct journey *j, const struct target *t, __u64 e, __u32 now)
{
	return ring_has(t->ring, (__u16)e, 0) &&
	       (j->p.protocol == IPPROTO_TCP || FLOW_IDLE(e, now) <= j->config->udp_ticks);
}

/* The backend of a DSR flow: the one it has, else the ring's, remembered from the first packet
 * after the SYN on. Until then the ring gives the same answer, so a flood of SYNs writes nothing.
 */
LB_INLINE enum verdict flow_backend(struct journey *j, const struct vip *vip,
				    const struct target *t, const int v6)
{
	struct flow_key k = flow_key_of(j, v6);
	__u64 hash = flow_hash(&k, vip, v6), tag = FLOW_TAG(hash), e, fresh;
	__u32 index = hash & (LB_FLOW_LINES - 1), now = now_ticks(), stage;
	struct flow_line *line;
	enum verdict v;
	int i = -1;

	line = LOOKUP(lb_flows, &index);
	if (!line)
		return LB_NO_BACKEND;
	if (!is_syn(&j->p))
		i = flow_find(line, tag);
	if (i >= 0) {
		i = lb_forget(i, hash, 7);
		e = line->flows[i & 7];
		if (flow_stays(j, t, e, now)) {
			j->result->backend_id = (__u16)e;
			stage = j->p.tcp_flags & (LB_TCP_FIN | LB_TCP_RST) ? FLOW_CLOSING
				: FLOW_STAGE(e) == FLOW_CLOSING		   ? FLOW_CLOSING
									   : FLOW_AGAIN;
			fresh = flow_entry(tag, stage, now, j->result->backend_id);
			if (fresh != e && !j->untraced)
				line->flows[i & 7] = fresh;
			return LB_CONTINUE;
		}
	}
	v = choose_backend(j, vip, t, now, v6);
	if (v != LB_CONTINUE)
		return v;
	j->result->is_new = is_syn(&j->p) || j->p.protocol == IPPROTO_UDP;
	if (!is_syn(&j->p) && !j->untraced) {
		if (i < 0)
			i = flow_victim(line, now);
		line->flows[i & 7] = flow_entry(tag, FLOW_ONCE, now, j->result->backend_id);
	}
	return LB_CONTINUE;
}

/* Send the packet, unchanged but for its TTL, to its backend's MAC address or through a tunnel. */
LB_INLINE enum verdict dsr_send(struct xdp_md *ctx, struct journey *j, __u8 mode, const int v6)
{
	struct neighbour *backend = get_backend(j->result->backend_id);
	struct packet *p = &j->p;
	__u32 path, outer = 0;
	enum verdict v;

	if (!backend)
		return LB_NO_BACKEND;
	path = ONCE(backend->path);
	if (mode == LB_MODE_DSR_IPIP)
		outer = backend->family == 6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	v = may_leave(j, path, outer, v6);
	if (v != LB_CONTINUE)
		return v;
	if (p->shape == LB_FIRST_FRAGMENT)
		remember_fragment(j, 0, mode, 0, v6);
	decrement_ttl(p, v6);
	if (!outer)
		return set_link(ctx, j, backend, path, p->ethertype, 0) ? LB_NO_HEADROOM
									: LB_DSR_L2;
	struct tunnel tunnel = {
		.bytes = p->bytes,
		.spread = source_of(p, v6)[v6 ? 3 : 0] ^ (__u32)p->remote_port << 16,
		.protocol = v6 ? IPPROTO_IPV6 : IPPROTO_IPIP,
		.class = v6 ? traffic_class6(p->l3) : ((struct iphdr *)p->l3)->tos,
	};

	if (backend->family == 6) {
		if (set_link(ctx, j, backend, path, LB_BE16(ETH_P_IPV6), sizeof(struct ipv6hdr)) ||
		    write_tunnel6(p->l3, p->end, &tunnel, j->config, backend->address))
			return LB_NO_HEADROOM;
	} else {
		if (set_link(ctx, j, backend, path, LB_BE16(ETH_P_IP), sizeof(struct iphdr)) ||
		    write_tunnel4(p->l3, p->end, &tunnel, j->config, backend->address))
			return LB_NO_HEADROOM;
	}
	return LB_DSR_IPIP;
}

LB_INLINE enum verdict dsr_forward(struct xdp_md *ctx, struct journey *j, const struct vip *vip,
				   const struct target *t, const int v6)
{
	enum verdict v = flow_backend(j, vip, t, v6);

	if (v != LB_CONTINUE)
		return v;
	v = dsr_send(ctx, j, t->mode, v6);
	if (j->p.shape == LB_QUOTE && v <= LB_LAST_FORWARD)
		return LB_ICMP_TO_BACKEND;
	return v;
}

/* ---- odd packets ----------------------------------------------------------------------------- */

#define FRAGMENT_TICKS 30 /* longest time between the first fragment and the last */

/* LB_CONTINUE when its first fragment did not come by. */
LB_INLINE enum verdict follow_first_fragment(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct scratch *s = get_scratch();
	struct neighbour *n;
	struct fragment *f;
	enum verdict v;
	__u32 path;

	if (!s || fragment_key_of(&j->p, &s->fragment_key, v6))
		return LB_CONTINUE;
	f = LOOKUP(lb_fragments, &s->fragment_key);
	if (!f || now_ticks() - f->seen > FRAGMENT_TICKS)
		return LB_CONTINUE;
	j->result->vip_id = f->vip;
	j->result->backend_id = f->backend;
	j->result->is_reply = f->is_reply;
	if (f->mode != LB_MODE_NAT) {
		v = dsr_send(ctx, j, f->mode, v6);
		return v <= LB_LAST_FORWARD ? LB_FRAGMENT_FORWARD : v;
	}
	n = f->is_reply ? get_router(f->router, v6) : get_backend(f->backend);
	if (!n)
		return LB_NO_NEXTHOP;
	path = ONCE(n->path);
	v = may_leave(j, path, 0, v6);
	if (v != LB_CONTINUE)
		return v;
	decrement_ttl(&j->p, v6);
	set_addresses(j->p.l3, f->source, f->destination, v6);
	if (set_link(ctx, j, n, path, j->p.ethertype, 0))
		return LB_NO_HEADROOM;
	return LB_FRAGMENT_FORWARD;
}

LB_INLINE enum verdict answer_echo(struct journey *j, const int v6)
{
	struct ethhdr *eth = j->p.start;

	if (j->config->echo != LB_POLICY_ANSWER)
		return LB_PROTOCOL;
	if (!may_answer(j))
		return LB_ICMP_LIMIT;
	if ((void *)(eth + 1) > j->p.end)
		return LB_MALFORMED;
	turn_link(eth);
	write_echo_reply(&j->p, v6);
	j->result->egress = j->p.ingress;
	return LB_ECHO_ANSWERED;
}

/* Not for a port that we serve. If the address is a VIP's, nobody else shall see the packet: a node
 * that does not know the port would route it back to us.
 */
LB_INLINE enum verdict odd_packet(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct icmphdr *icmp = j->p.l4;

	if (!is_vip_address(&j->p, v6))
		return LB_NOT_OURS;
	switch (j->p.shape) {
	case LB_PLAIN:
	case LB_FIRST_FRAGMENT:
		return LB_NO_PORT;
	case LB_LATER_FRAGMENT:
		return LB_FRAGMENT_LOST;
	case LB_OPTIONS:
		return j->config->options == LB_POLICY_PASS ? LB_NOT_OURS : LB_IP_OPTIONS;
	case LB_EXTENSION:
		return j->config->options == LB_POLICY_PASS ? LB_NOT_OURS : LB_EXTENSION_HEADER;
	case LB_ECHO:
		return answer_echo(j, v6);
	case LB_ICMP:
		if (v6 && (void *)(icmp + 1) <= j->p.end && icmp->type >= 133 && icmp->type <= 137)
			return LB_NOT_OURS; /* neighbour discovery is the kernel's */
		return LB_ICMP_UNMATCHED;
	case LB_QUOTE:
		return LB_ICMP_UNMATCHED;
	case LB_OTHER:
		return LB_PROTOCOL;
	default:
		return LB_MALFORMED;
	}
}

/* ---- answers: what the sender is told when something was wrong ---------------------------------
 */

LB_INLINE int take_question(struct packet *p, struct question *q, const int v6)
{
	struct ethhdr *eth = p->start;
	struct tcphdr *tcp = p->l4;

	if ((void *)(eth + 1) + 10 > p->end)
		return -1;
	__builtin_memcpy(q->macs, eth, 12);
	__builtin_memcpy(q->types, (void *)eth + 12, sizeof(q->types));
	copy_address(q->source, source_of(p, v6), v6);
	copy_address(q->destination, destination_of(p, v6), v6);
	q->remote_port = p->remote_port;
	q->local_port = p->local_port;
	if (p->protocol != IPPROTO_TCP)
		return 0;
	if ((void *)(tcp + 1) > p->end)
		return -1;
	q->sequence = tcp->seq;
	q->acknowledged = tcp->ack_seq;
	q->segment_bytes = p->bytes - (p->l4 - p->l3) - tcp->doff * 4 +
			   !!(p->tcp_flags & LB_TCP_SYN) + !!(p->tcp_flags & LB_TCP_FIN);
	return 0;
}

/* The packet becomes the answer's size; its link header, turned round, is written. */
LB_INLINE int resize(struct xdp_md *ctx, struct journey *j, const struct question *q,
		     __u32 l3_bytes, __u32 more_in_front)
{
	struct packet *p = &j->p;
	struct ethhdr *eth;
	/* a long packet may lie in several buffers, of which start and end show the first */
	int cut = (int)(p->link + l3_bytes) - (int)bpf_xdp_get_buff_len(ctx);

	if (bpf_xdp_adjust_tail(ctx, cut))
		return -1;
	if (more_in_front && bpf_xdp_adjust_head(ctx, -(int)more_in_front))
		return -1;
	p->start = (void *)(long)ctx->data;
	p->end = (void *)(long)ctx->data_end;
	eth = p->start;
	if ((void *)(eth + 1) + 10 > p->end)
		return -1;
	__builtin_memcpy(eth->h_dest, q->macs + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(eth->h_source, q->macs, ETH_ALEN);
	/* with more of the old packet behind the Ethertype, where our IP header will stand */
	__builtin_memcpy((void *)eth + 12, q->types, sizeof(q->types));
	p->l3 = p->start + p->link;
	LB_KEEP(p->l3);
	j->result->egress = p->ingress;
	return 0;
}

LB_INLINE int answer_reset(struct xdp_md *ctx, struct journey *j, const struct question *q,
			   const int v6)
{
	const __u32 head = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	struct tcphdr *tcp;

	if (resize(ctx, j, q, head + sizeof(*tcp), 0))
		return -1;
	tcp = j->p.l3 + head;
	if ((void *)(tcp + 1) > j->p.end)
		return -1;
	if (v6)
		write_ip6(j->p.l3, q, IPPROTO_TCP, sizeof(*tcp));
	else
		write_ip4(j->p.l3, q, IPPROTO_TCP, sizeof(*tcp));
	write_reset(tcp, q, j->p.tcp_flags, v6);
	return 0;
}

LB_INLINE int answer_error(struct xdp_md *ctx, struct journey *j, const struct question *q,
			   enum verdict v, const int v6)
{
	const __u32 head = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	const __u32 quoted = head + LB_QUOTED_L4;
	struct icmphdr *icmp;
	__u8 type, code = 0;

	if (resize(ctx, j, q, quoted, head + sizeof(*icmp)))
		return -1;
	icmp = j->p.l3 + head;
	if ((void *)(icmp + 1) + quoted > j->p.end)
		return -1;
	if (v6)
		write_ip6(j->p.l3, q, IPPROTO_ICMPV6, sizeof(*icmp) + quoted);
	else
		write_ip4(j->p.l3, q, IPPROTO_ICMP, sizeof(*icmp) + quoted);
	if (v == LB_TOO_BIG) {
		type = v6 ? ICMPV6_PKT_TOOBIG : ICMP_DEST_UNREACH;
		code = v6 ? 0 : ICMP_FRAG_NEEDED;
	} else if (v == LB_TTL_EXPIRED) {
		type = v6 ? ICMPV6_TIME_EXCEED : ICMP_TIME_EXCEEDED;
	} else {
		type = v6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH;
		code = v6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH;
	}
	write_icmp_error(icmp, q, type, code, v == LB_TOO_BIG ? j->result->mtu : 0, v6);
	return 0;
}

/* Some refusals are told to the sender, if policy and rate allow. The packet is still unchanged. */
LB_INLINE enum verdict answer(struct xdp_md *ctx, struct journey *j, enum verdict v, const int v6)
{
	struct question *q;
	struct scratch *s;
	int is_refused;

	if (v != LB_NO_PORT && v != LB_NO_FLOW && v != LB_TOO_BIG && v != LB_TTL_EXPIRED)
		return v;
	v = lb_forget(v, j->p.bytes, 63);
	is_refused = v == LB_NO_PORT || v == LB_NO_FLOW;
	if (j->p.shape > LB_FIRST_FRAGMENT || (is_refused && j->p.shape != LB_PLAIN))
		return v; /* no errors about errors or about parts (RFC 1122, 3.2.2) */
	if (is_refused && (j->config->no_port != LB_POLICY_ANSWER || j->p.tcp_flags & LB_TCP_RST))
		return v;
	if (!may_answer(j))
		return LB_ICMP_LIMIT;
	s = get_scratch();
	if (!s)
		return v;
	q = &s->question;
	if (take_question(&j->p, q, v6))
		return v;
	if (is_refused && j->p.protocol == IPPROTO_TCP) {
		if (answer_reset(ctx, j, q, v6))
			return LB_NO_HEADROOM;
		return v == LB_NO_FLOW ? LB_NO_FLOW_RESET : LB_PORT_REFUSED;
	}
	if (answer_error(ctx, j, q, v, v6))
		return LB_NO_HEADROOM;
	return v == LB_TOO_BIG	     ? LB_TOO_BIG_ANSWERED
	       : v == LB_TTL_EXPIRED ? LB_TTL_ANSWERED
				     : LB_PORT_REFUSED;
}

/* ---- the journey ----------------------------------------------------------------------------- */

LB_INLINE enum verdict journey(struct xdp_md *ctx, struct journey *j, const int v6)
{
	struct packet *p = &j->p;
	struct vip *vip;
	struct target t;
	enum verdict v;
	__u32 snat_id;
	__u16 hint;

	if (v6 ? parse_ip6(p) : parse_ip4(p))
		return LB_NOT_OURS;
	j->result->bytes = p->bytes;
	hint = address_hint(p, v6);
	if (!hint)
		return LB_NOT_OURS;
	j->config = get_config();
	if (!j->config)
		return LB_NOT_OURS;
	if (p->shape <= LB_FIRST_FRAGMENT)
		parse_l4(p, v6);
	if (p->shape > LB_LAST_COMMON) {
		v = LB_CONTINUE;
		if (p->shape == LB_LATER_FRAGMENT)
			v = follow_first_fragment(ctx, j, v6);
		return v == LB_CONTINUE ? odd_packet(ctx, j, v6) : v;
	}
	if (p->shape == LB_QUOTE)
		j->untraced = 1;
	if (hint & LB_HINT_SNAT && find_snat(p, hint, &snat_id, v6))
		return nat_reply(ctx, j, snat_id, v6);
	vip = find_vip(j, v6);
	if (!vip)
		return odd_packet(ctx, j, v6);
	t = read_target(vip);
	if (t.ranges && !source_allowed(p, t.ranges, v6))
		return LB_SOURCE_DENIED;
	if (t.mode == LB_MODE_NAT)
		return nat_forward(ctx, j, vip, &t, v6);
	return dsr_forward(ctx, j, vip, &t, v6);
}

LB_INLINE void count(const struct result *r, enum verdict v, __u32 id)
{
	struct counter *c = get_counter(id);

	if (!c)
		return;
	if (v > LB_LAST_ANSWER) {
		c->drops++;
	} else if (r->is_reply) {
		c->replies++;
		c->reply_bytes += r->bytes;
	} else {
		c->packets++;
		c->bytes += r->bytes;
	}
	c->flows += r->is_new;
}

/* The one exit: count the verdict and make it an action. */
LB_INLINE int leave(const struct journey *j, enum verdict v)
{
	struct result *r = j->result;
	int action = XDP_DROP;
	struct counter *c;

	v = lb_forget(v, r->bytes, 63);
	r->vip_id = lb_forget(r->vip_id, r->bytes, 0xffff);
	r->backend_id = lb_forget(r->backend_id, r->bytes, 0xffff);
	r->is_reply = lb_forget(r->is_reply, r->bytes, 1);
	r->is_new = lb_forget(r->is_new, r->bytes, 1);
	if (v <= LB_LAST_PASS)
		action = XDP_PASS;
	else if (v <= LB_LAST_ANSWER)
		action = r->egress == j->p.ingress ? XDP_TX : XDP_REDIRECT;
	if (j->trial)
		return action | v << 8 | r->backend_id << 16;
	c = get_counter(v);
	if (c) {
		c->packets++;
		c->bytes += r->bytes;
	}
	if (r->vip_id)
		count(r, v, LB_COUNTER_VERDICTS + r->vip_id);
	if (r->backend_id)
		count(r, v, LB_COUNTER_VERDICTS + LB_VIPS + r->backend_id);
	return action == XDP_REDIRECT ? bpf_redirect(r->egress, 0) : action;
}

int lb(struct xdp_md *ctx)
{
	struct result result = {};
	struct journey j;
	enum verdict v;

	asm volatile("" : : "r"(&result) : "memory"); /* in memory, see there */
	j.result = &result;
	j.p.ingress = ctx->ingress_ifindex;
	j.trial = lb_forget(j.p.ingress == TRIAL_IFINDEX, j.p.ingress, 1);
	j.untraced = j.trial;
	parse_link(&j.p, (void *)(long)ctx->data, (void *)(long)ctx->data_end);
	if (j.p.ethertype == LB_BE16(ETH_P_IP))
		v = answer(ctx, &j, journey(ctx, &j, 0), 0);
	else if (j.p.ethertype == LB_BE16(ETH_P_IPV6))
		v = answer(ctx, &j, journey(ctx, &j, 1), 1);
	else
		v = LB_NOT_IP;
	return leave(&j, v);
}
