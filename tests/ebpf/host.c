/* SPDX-License-Identifier: GPL-2.0-only */
/* The pure headers of ebpf/ on a host, under the address and undefined-behaviour sanitizers.
 *
 *   host fuzz ROUNDS SEED   random and mutated packets through every parser and every rewrite
 *   host check              known answers
 *
 * Every packet lies at the end of its own allocation, so that one byte too many is noticed.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static unsigned long long state;

static unsigned next(void)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return state >> 33;
}

static __u16 plain_sum(const void *from, unsigned bytes, __u64 sum)
{
	const unsigned char *b = from;

	for (unsigned i = 0; i < bytes; i++)
		sum += i & 1 ? (unsigned)b[i] << 8 : b[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Something like a packet: right in the places that lead deeper, random elsewhere. */
static unsigned compose(unsigned char *b, unsigned room)
{
	static const __u8 protocols[] = {6, 17, 1, 58, 44, 0, 43, 60, 51, 50, 132};
	unsigned length = next() % room, at = 14, v6 = next() & 1;

	for (unsigned i = 0; i < room; i++)
		b[i] = next();
	for (unsigned tags = next() % 4; tags && at + 4 < room; tags--, at += 4) {
		b[at - 2] = next() & 1 ? 0x81 : 0x88;
		b[at - 1] = b[at - 2] == 0x81 ? 0x00 : 0xa8;
	}
	b[at - 2] = v6 ? 0x86 : 0x08;
	b[at - 1] = v6 ? 0xdd : 0x00;
	if (at + 60 < room) {
		__u8 protocol = protocols[next() % sizeof(protocols)];

		b[at] = v6 ? 0x60 : next() % 4 ? 0x45 : next();
		b[at + (v6 ? 6 : 9)] = protocol;
		if (!v6 && next() % 2)
			b[at + 6] = b[at + 7] = 0;
		if (protocol == 44)
			b[at + 40] = protocols[next() % sizeof(protocols)];
		if (protocol == 1 ||
		    protocol == 58) { /* an error that quotes what we might have sent */
			unsigned l4 = at + (v6 ? 40 : 20), q = l4 + 8;

			b[l4] = v6 ? 1 + next() % 4 : 3;
			if (q + 48 < room) {
				b[q] = v6 ? 0x60 : 0x45;
				b[q + (v6 ? 6 : 9)] = next() & 1 ? 6 : 17;
				if (!v6)
					b[q + 6] = b[q + 7] = 0;
				memcpy(b + q + (v6 ? 8 : 12), b + at + (v6 ? 24 : 16), v6 ? 16 : 4);
			}
		}
	}
	return length;
}

static void journey(unsigned char *b, unsigned length)
{
	struct packet p = {0};
	int v6;

	parse_link(&p, b, b + length);
	if (p.ethertype != LB_BE16(ETH_P_IP) && p.ethertype != LB_BE16(ETH_P_IPV6))
		return;
	v6 = p.ethertype == LB_BE16(ETH_P_IPV6);
	if (v6 ? parse_ip6(&p) : parse_ip4(&p))
		return;
	if (p.shape <= LB_FIRST_FRAGMENT)
		parse_l4(&p, v6);
	assert(p.shape <= LB_TRUNCATED);
	if (p.shape == LB_ECHO)
		write_echo_reply(&p, v6);
	if (p.shape > LB_LAST_COMMON)
		return;

	__be32 source[4] = {next(), next(), next(), next()},
	       destination[4] = {next(), next(), next(), next()};
	struct ends ends = {source, destination, next(), next()};
	struct iphdr *ip = p.l3;
	__u16 before = v6 ? 0 : plain_sum(ip, 20, 0);

	if (ttl_is_over(&p, v6))
		return;
	decrement_ttl(&p, v6);
	rewrite_ends(&p, &ends, v6);
	assert(same_address(source_of(&p, v6), source, v6));
	assert(same_address(destination_of(&p, v6), destination, v6));
	if (!v6) { /* right before, right after; wrong by as much as before otherwise */
		__u16 after = plain_sum(ip, 20, 0);

		assert(before == after || (before % 0xffff == 0 && after % 0xffff == 0));
	}
}

static void fuzz(unsigned rounds)
{
	for (unsigned i = 0; i < rounds; i++) {
		unsigned char made[256], *copy;
		unsigned length = compose(made, sizeof(made));

		copy = malloc(length ? length : 1);
		memcpy(copy, made, length);
		journey(copy, length);
		free(copy);
	}
}

static void check(void)
{
	/* states: a spoofed SYN and a blind ACK establish nothing */
	assert(nat_state_after_client(LB_NAT_SYN, LB_TCP_ACK) == LB_NAT_SYN);
	assert(nat_state_after_backend(LB_NAT_SYN, LB_TCP_SYN | LB_TCP_ACK) == LB_NAT_SYN_ACK);
	assert(nat_state_after_client(LB_NAT_SYN_ACK, LB_TCP_ACK) == LB_NAT_ESTABLISHED);
	assert(nat_state_after_client(LB_NAT_FIN_BACKEND, LB_TCP_FIN) == LB_NAT_CLOSED);
	assert(nat_state_after_backend(LB_NAT_FIN_CLIENT, LB_TCP_FIN) == LB_NAT_CLOSED);
	assert(nat_state_after_client(LB_NAT_UDP, 0) == LB_NAT_UDP);
	assert(nat_state_after_backend(LB_NAT_UDP, 0) == LB_NAT_UDP_STREAM);
	for (unsigned s = 0; s < LB_NAT_STATES; s++)
		for (unsigned f = 0; f < 256; f++) {
			assert(nat_state_after_client(s, f) < LB_NAT_STATES);
			assert(nat_state_after_backend(s, f) < LB_NAT_STATES);
		}
	__u64 life = nat_life(LB_NAT_ESTABLISHED, 0xbeef, 0xfffffff0);

	assert(nat_state(life) == LB_NAT_ESTABLISHED && nat_generation(life) == 0xbeef);
	assert(nat_idle(life, 0xfffffff0) == 1 && nat_idle(life, 5) == 22);
	assert(nat_idle(life, 0xffffffef) == 0); /* another CPU is a tick ahead */

	/* checksums: RFC 1624's own example, and UDP's two zeros */
	assert(checksum_changed(LB_BE16(0xdd2f), change16(LB_BE16(0x5555), LB_BE16(0x3285))) ==
	       LB_BE16(0x0000));
	assert(udp_checksum_changed(0, change16(1, 2)) == 0);
	assert(udp_checksum_changed(LB_BE16(0xdd2f), change16(LB_BE16(0x5555), LB_BE16(0x3285))) ==
	       0xffff);
	for (unsigned i = 0; i < 100000; i++) {
		__u16 words[6];

		for (int w = 0; w < 6; w++)
			words[w] = next();
		words[5] = 0;
		words[5] = ~plain_sum(words, 12, 0);
		__be32 old, new = next();

		memcpy(&old, words, 4);
		memcpy(words, &new, 4);
		words[5] = checksum_changed(words[5], change32(old, new));
		assert(plain_sum(words, 12, 0) == 0xffff);
	}

	/* rings: every slot is reached, none beyond */
	assert(ring_slot(0) == 0 && ring_slot(~0ull) == LB_RING_SLOTS - 1);
	/* hashes for the Python twin */
	__be32 a4[4] = {LB_BE32(0xcb007101)}, a6[4] = {LB_BE32(0x20010db8), 0, 0, LB_BE32(1)};

	printf("mix %llx\n", (unsigned long long)mix(0x0123456789abcdefull));
	printf("index4 %llx\n", (unsigned long long)index_hash(a4, LB_BE16(80), 6, 0));
	printf("index6 %llx\n", (unsigned long long)index_hash(a6, LB_BE16(80), 6, 1));
	printf("hint4 %u\n", hint_index4(a4[0]));
	printf("hint6 %u\n", hint_index6(a6));
	printf("sizes vip=%zu neighbour=%zu hop=%zu router_key=%zu snat=%zu nat_bucket=%zu "
	       "range4=%zu range6=%zu "
	       "client_key=%zu client=%zu fragment_key=%zu fragment=%zu limit_key=%zu limit=%zu "
	       "scratch=%zu "
	       "counter=%zu config=%zu\n",
	       sizeof(struct vip), sizeof(struct neighbour), sizeof(struct hop),
	       sizeof(struct router_key), sizeof(struct snat), sizeof(struct nat_bucket),
	       sizeof(struct range_key4), sizeof(struct range_key6), sizeof(struct client_key),
	       sizeof(struct client), sizeof(struct fragment_key), sizeof(struct fragment),
	       sizeof(struct limit_key), sizeof(struct limit), sizeof(struct scratch),
	       sizeof(struct counter), sizeof(struct config));
	printf("layout %d ring_lines %d counters %d verdicts %d\n", LB_LAYOUT, LB_RING_LINES,
	       LB_COUNTERS, LB_VERDICTS);
}

int main(int argc, char **argv)
{
	state = argc > 3 ? strtoull(argv[3], 0, 0) : 1;
	if (argc > 2 && !strcmp(argv[1], "fuzz"))
		fuzz(atoi(argv[2]));
	else
		check();
	return 0;
}
