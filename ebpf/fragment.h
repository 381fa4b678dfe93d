/* SPDX-License-Identifier: GPL-2.0-only */
/* Fragments: the first one decides, the others follow. */
#ifndef LB_FRAGMENT_H
#define LB_FRAGMENT_H

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

#endif
