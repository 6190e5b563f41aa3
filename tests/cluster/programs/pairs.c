/*
 * Random messages between all pairs of ranks without pause, every byte and the order checked at the receiver.
 *
 *     pairs SEED ROUNDS [BLOCK [MAX_BYTES [PAUSE [GATE]]]]
 *
 * In each round every ordered pair exchanges 0 to 3 messages of 1 to MAX_BYTES bytes (4 MiB; small ones are as frequent
 * as large ones, by orders of magnitude). Sizes, contents and ways follow from (SEED, source, destination, number of
 * the message of this pair). Two ways are mixed:
 *     BLOCKING  a receive posted at the start of the round, MPI_Send or MPI_Ssend
 *     PROBED    MPI_Isend or MPI_Issend, MPI_Probe or MPI_Mprobe and a blocking receive
 * PAUSE, milliseconds between two rounds, is for a job that has to be there for a while. With GATE the last BLOCK
 * rounds begin only when there is a file of that name, and from then on there is no PAUSE.
 * No rank waits for a round of the others but by these messages, so the ranks run up to a round apart.
 *
 * stdout, the same in every run with the same arguments and number of ranks: a line per BLOCK rounds (10) and
 *     ok messages=N bytes=M digest=D
 * The first wrong byte, size or order is a line on stderr and exit code 3.
 */
#include <inttypes.h>
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCKING, PROBED, WAYS };
enum { MAX_PER_PAIR = 3 };

struct message {
    int peer;
    uint64_t number; /* of this ordered pair, from 0 */
    uint64_t key;    /* what size, way and contents follow from */
    int size;
    unsigned char *data;
};

struct list {
    struct message *items;
    int count;
};

static uint64_t seed;
static int rank, ranks;
static double max_bytes = 4 << 20;
static uint64_t *sent, *received; /* per peer: messages so far */
static uint64_t total[3];         /* received: messages, bytes, digest */

static uint64_t mix(uint64_t x)
{
    /* the finaliser of splitmix64 */
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t pair_key(int source, int destination, uint64_t number)
{
    return mix(mix(mix(mix(seed) ^ (uint64_t)source) ^ (uint64_t)destination) ^ number);
}

static int way_of(const struct message *m)
{
    return (int)(mix(m->key ^ 1) % WAYS);
}

static int size_of(uint64_t key)
{
    /* log-uniform without libm: doubling as often as the upper bits say, the rest linear */
    double size = 1;
    uint64_t dice = mix(key ^ 2);
    int doublings = 0;
    while (size * 2 <= max_bytes) {
        size *= 2;
        doublings++;
    }
    size = (double)(UINT64_C(1) << (dice % (uint64_t)(doublings + 1)));
    size += (double)((dice >> 16) % (uint64_t)size);
    return (int)(size < max_bytes ? size : max_bytes);
}

static uint64_t word_of(const struct message *m, uint64_t index)
{
    return mix(m->key + index);
}

static void fill(struct message *m)
{
    int at = 0;
    for (uint64_t i = 0; at < m->size; i++, at += 8) {
        uint64_t word = word_of(m, i);
        memcpy(m->data + at, &word, (size_t)(m->size - at < 8 ? m->size - at : 8));
    }
}

static void fail(const struct message *m, const char *what, long expected, long found)
{
    fprintf(stderr, "rank %d: message %" PRIu64 " from rank %d, %d bytes: %s: expected %ld, found %ld\n", rank, m->number,
            m->peer, m->size, what, expected, found);
    fflush(stderr);
    MPI_Abort(MPI_COMM_WORLD, 3);
}

static void check_size(const struct message *m, const MPI_Status *status)
{
    int count;

    MPI_Get_count(status, MPI_BYTE, &count);
    if (count != m->size)
        fail(m, "size", m->size, count);
}

static void check(const struct message *m, const MPI_Status *status)
{
    int at = 0;
    uint64_t digest = mix(m->key ^ 3);

    check_size(m, status);
    for (uint64_t i = 0; at < m->size; i++, at += 8) {
        uint64_t word = word_of(m, i);
        int length = m->size - at < 8 ? m->size - at : 8;
        uint64_t found = 0;

        memcpy(&found, m->data + at, (size_t)length);
        if (memcmp(&word, m->data + at, (size_t)length) != 0)
            for (int k = 0; k < length; k++)
                if (m->data[at + k] != ((unsigned char *)&word)[k]) {
                    fprintf(stderr, "rank %d: at byte %d: ", rank, at + k);
                    fail(m, "content", ((unsigned char *)&word)[k], m->data[at + k]);
                }
        digest = (digest ^ found) * UINT64_C(0x100000001b3);
    }
    total[0] += 1;
    total[1] += (uint64_t)m->size;
    total[2] += mix(digest); /* a sum: whatever the order in which different pairs' messages came */
}

static void *allocate(size_t size)
{
    void *memory = malloc(size ? size : 1);
    if (!memory) {
        fprintf(stderr, "rank %d: no memory for %zu bytes\n", rank, size);
        MPI_Abort(MPI_COMM_WORLD, 4);
    }
    return memory;
}

static int messages_of(int source, int destination, int round)
{
    return (int)(mix(pair_key(source, destination, ~(uint64_t)round) ^ 4) % (MAX_PER_PAIR + 1));
}

/* This round's messages to (outgoing) or from all others, by way; peers in an order of the round's own. */
static void plan(struct list lists[WAYS], int round, int outgoing)
{
    int shift = (int)(mix(seed ^ (uint64_t)round ^ ((uint64_t)rank << 32)) % (uint64_t)ranks);

    for (int w = 0; w < WAYS; w++) {
        lists[w].items = allocate(sizeof(struct message) * MAX_PER_PAIR * (size_t)ranks);
        lists[w].count = 0;
    }
    for (int i = 0; i < ranks; i++) {
        int peer = (i + shift) % ranks;
        int source = outgoing ? rank : peer, destination = outgoing ? peer : rank;
        uint64_t *number = outgoing ? &sent[peer] : &received[peer];

        if (peer == rank)
            continue;
        for (int n = messages_of(source, destination, round); n > 0; n--) {
            struct message m = {.peer = peer, .number = (*number)++};
            struct list *list;

            m.key = pair_key(source, destination, m.number);
            m.size = size_of(m.key);
            m.data = allocate((size_t)m.size);
            if (outgoing)
                fill(&m);
            list = &lists[way_of(&m)];
            list->items[list->count++] = m;
        }
    }
}

static void discard(struct list lists[WAYS])
{
    for (int w = 0; w < WAYS; w++) {
        for (int i = 0; i < lists[w].count; i++)
            free(lists[w].items[i].data);
        free(lists[w].items);
    }
}

static void receive_probed(struct message *m)
{
    MPI_Status status;

    if (m->key & 1) {
        MPI_Message handle;

        MPI_Mprobe(m->peer, PROBED, MPI_COMM_WORLD, &handle, &status);
        check_size(m, &status);
        MPI_Mrecv(m->data, m->size, MPI_BYTE, &handle, &status);
    } else {
        MPI_Probe(m->peer, PROBED, MPI_COMM_WORLD, &status);
        check_size(m, &status);
        MPI_Recv(m->data, m->size, MPI_BYTE, m->peer, PROBED, MPI_COMM_WORLD, &status);
    }
    check(m, &status);
}

static void exchange(int round)
{
    struct list out[WAYS], in[WAYS];
    MPI_Request *receives, *sends;
    MPI_Status *statuses;

    plan(in, round, 0);
    plan(out, round, 1);
    receives = allocate(sizeof(MPI_Request) * (size_t)in[BLOCKING].count);
    statuses = allocate(sizeof(MPI_Status) * (size_t)in[BLOCKING].count);
    sends = allocate(sizeof(MPI_Request) * (size_t)out[PROBED].count);

    /* Free of deadlock: what is sent with blocking has its receive posted before its receiver blocks anywhere. */
    for (int i = 0; i < in[BLOCKING].count; i++) {
        struct message *m = &in[BLOCKING].items[i];
        MPI_Irecv(m->data, m->size, MPI_BYTE, m->peer, BLOCKING, MPI_COMM_WORLD, &receives[i]);
    }
    for (int i = 0; i < out[PROBED].count; i++) {
        struct message *m = &out[PROBED].items[i];
        (m->key & 2 ? MPI_Issend : MPI_Isend)(m->data, m->size, MPI_BYTE, m->peer, PROBED, MPI_COMM_WORLD, &sends[i]);
    }
    for (int i = 0; i < out[BLOCKING].count; i++) {
        struct message *m = &out[BLOCKING].items[i];
        (m->key & 2 ? MPI_Ssend : MPI_Send)(m->data, m->size, MPI_BYTE, m->peer, BLOCKING, MPI_COMM_WORLD);
    }
    for (int i = 0; i < in[PROBED].count; i++)
        receive_probed(&in[PROBED].items[i]);
    MPI_Waitall(in[BLOCKING].count, receives, statuses);
    for (int i = 0; i < in[BLOCKING].count; i++)
        check(&in[BLOCKING].items[i], &statuses[i]);
    MPI_Waitall(out[PROBED].count, sends, MPI_STATUSES_IGNORE);

    free(receives);
    free(statuses);
    free(sends);
    discard(in);
    discard(out);
}

static int shut(const char *gate)
{
    return gate && access(gate, F_OK) != 0;
}

static void report(const char *what)
{
    uint64_t sum[3];

    MPI_Reduce(total, sum, 3, MPI_UINT64_T, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        printf("%s messages=%" PRIu64 " bytes=%" PRIu64 " digest=%016" PRIx64 "\n", what, sum[0], sum[1], sum[2]);
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    int rounds, block, pause;
    const char *gate;
    char name[32];

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc < 3 || ranks < 2) {
        fprintf(stderr, "usage: mpirun -n 2 (or more) pairs SEED ROUNDS [BLOCK [MAX_BYTES [PAUSE [GATE]]]]\n");
        MPI_Abort(MPI_COMM_WORLD, 2);
    }
    seed = strtoull(argv[1], NULL, 0);
    rounds = atoi(argv[2]);
    block = argc > 3 ? atoi(argv[3]) : 10;
    if (argc > 4)
        max_bytes = atof(argv[4]);
    pause = argc > 5 ? atoi(argv[5]) : 0;
    gate = argc > 6 ? argv[6] : NULL;
    sent = calloc((size_t)ranks, sizeof(*sent));
    received = calloc((size_t)ranks, sizeof(*received));
    if (!sent || !received)
        MPI_Abort(MPI_COMM_WORLD, 4);
    for (int round = 1; round <= rounds; round++) {
        while (round > rounds - block && shut(gate))
            usleep(50000);
        exchange(round);
        if (pause > 0 && (!gate || shut(gate)))
            usleep((useconds_t)pause * 1000);
        if (round % block == 0) {
            snprintf(name, sizeof(name), "round %d", round);
            report(name);
        }
    }
    report("ok");
    MPI_Finalize();
    free(sent);
    free(received);
    return 0;
}
