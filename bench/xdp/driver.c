/* SPDX-License-Identifier: GPL-2.0-only */
/* What the bench really runs. BPF_PROG_TEST_RUN with repeat never resets the packet, so a program
 * that rewrites would see its own output: this one puts length and headers back, optionally gives
 * each run another client address, then tail-calls the program under test. The same driver in front
 * of `stub` is the price that is subtracted.
 */
#include <uapi/linux/bpf.h>

#define MAP(name)  bpf_pseudo_fd(1, FD_##name)
#define HEAD_WORDS 10

struct order {
	u64 head[HEAD_WORDS]; /* pristine packet head */
	u32 length;
	u32 flows;     /* 0 or 1: one flow, else go round n client addresses */
	u32 varied_at; /* where the varied word is: 26 for IPv4, 34 for IPv6 */
	u32 counter;
	u32 salt;
	u32 lost; /* the tail call did not happen */
	u32 pad[2];
};

int drive(struct xdp_md *ctx)
{
	u32 zero = 0;
	struct order *o = bpf_map_lookup_elem_(MAP(bench_order), &zero);
	void *start = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	int grown;
	u64 *to;

	if (!o)
		return XDP_ABORTED;
	grown = (int)(end - start) - (int)o->length;
	if (grown) {
		if (bpf_xdp_adjust_head(ctx, grown))
			return XDP_ABORTED;
		start = (void *)(long)ctx->data;
		end = (void *)(long)ctx->data_end;
	}
	if (start + 64 > end)
		return XDP_ABORTED;
	to = start;
#pragma unroll
	for (int i = 0; i < 8; i++)
		to[i] = o->head[i];
	if (start + 8 * HEAD_WORDS <= end) {
		to[8] = o->head[8];
		to[9] = o->head[9];
	}
	if (o->flows > 1) {
		u32 c = o->counter + 1;

		if (c >= o->flows)
			c = 0;
		o->counter = c;
		c = (c + o->salt) * 2654435761u;
		if (o->varied_at == 26)
			*(u32 *)(start + 26) = c;
		else
			*(u32 *)(start + 34) = c;
	}
	bpf_tail_call_(MAP(bench_jump), ctx, 0);
	o->lost++;
	return XDP_ABORTED;
}

int stub(struct xdp_md *ctx)
{
	return XDP_TX;
}

/* makes the driver undo an encapsulation next time */
int grow20(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_head(ctx, -20) ? XDP_ABORTED : XDP_TX;
}

int grow40(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_head(ctx, -40) ? XDP_ABORTED : XDP_TX;
}

int empty(struct xdp_md *ctx)
{
	return XDP_PASS;
}

/* Source of live frames: the whole header anew for each packet, because frames come back from the
 * page pool as their last consumer left them. Here `salt` is the interface to send by.
 */
int generate(struct xdp_md *ctx)
{
	u32 zero = 0, c, address;
	struct order *o = bpf_map_lookup_elem_(MAP(bench_order), &zero);
	void *start = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	u64 *to = start, sum;

	if (!o || start + 64 > end)
		return XDP_DROP;
#pragma unroll
	for (int i = 0; i < 8; i++)
		to[i] = o->head[i];
	c = o->counter + 1;
	if (c >= o->flows)
		c = 0;
	o->counter = c;
	/* client 10.1.1.0 + c / 16384, port 1024 + c % 16384; the IP checksum follows by difference
	 */
	address = __builtin_bswap32(0x0a010100 + (c >> 14));
	sum = (u16) ~*(u16 *)(start + 24) + (u64)(u32) ~*(u32 *)(start + 26) + address;
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*(u16 *)(start + 24) = ~sum;
	*(u32 *)(start + 26) = address;
	*(u16 *)(start + 34) = __builtin_bswap16(1024 + (c & 16383));
	return bpf_redirect(o->salt, 0);
}

int sink(struct xdp_md *ctx)
{
	u32 zero = 0;
	struct order *o = bpf_map_lookup_elem_(MAP(bench_order), &zero);

	if (o)
		o->head[0]++;
	return XDP_DROP;
}
