/* NCCL for tests: ranks are threads or processes of one machine, devices are the host's memory, and streams are not looked at.
 * A call returns ncclInProgress; a thread moves the bytes through shared memory, and ncclCommGetAsyncError says when it is done.
 * All ranks make the same collectives in the same order; sends and receives are in groups, and concern a communicator's ranks pair
 * by pair: those that a group does not name need not call. What does not fit together, of bytes, is an error with both calls, on
 * every rank that took part. A rank that does not come is named after FAKE_NCCL_SECONDS (20). FAKE_VERSION is the version that
 * the library says it is. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef FAKE_VERSION
#define FAKE_VERSION 23007
#endif

enum { SUCCESS, CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS };
enum { MAX_RANKS = 16, MAX_OPS = 256, CHUNK = 1 << 20, TEXT = 512 };

typedef struct {
	char name[128];
} id_t128;

/* A send, a receive, or the one part of a collective. */
struct op {
	char kind[12];
	int peer;
	size_t bytes;
};

/* What a rank calls. */
struct call {
	int count;
	struct op ops[MAX_OPS];
};

struct shared {
	atomic_int failed;
	char failure[TEXT];
	/* How often a rank has met another one. */
	atomic_ulong phase[MAX_RANKS][MAX_RANKS];
	struct call calls[MAX_RANKS];
	char data[MAX_RANKS][CHUNK];
};

struct comm {
	struct shared *shared;
	char name[128];
	int rank, size;
	unsigned long phase[MAX_RANKS];
	atomic_int state, aborted;
	char error[TEXT];
	pthread_t thread;
	int running;
	/* Of the call in progress: where its bytes are, op by op; of a collective also where they go. */
	struct call call;
	char *places[MAX_OPS], *target;
};

static __thread int depth;
static __thread struct call group;
static __thread char *group_places[MAX_OPS];
static __thread struct comm *group_comm;
static __thread char last[TEXT];

static int say(struct comm *comm, int code, const char *text) {
	snprintf(comm ? comm->error : last, TEXT, "%s", text);
	return code;
}

int ncclGetVersion(int *version) { return *version = FAKE_VERSION, SUCCESS; }

const char *ncclGetErrorString(int code) {
	static const char *texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
				      "invalid argument", "invalid usage", "remote process exited or there was a network error",
				      "in progress"};
	return code >= 0 && code <= IN_PROGRESS ? texts[code] : "unknown";
}

const char *ncclGetLastError(struct comm *comm) { return comm ? comm->error : last; }

int ncclGetUniqueId(id_t128 *id) {
	static atomic_int made;
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	memset(id, 0, sizeof *id);
	snprintf(id->name, sizeof id->name, "/arl-fake-nccl-%d-%d-%ld", getpid(), made++, now.tv_nsec);
	int file = shm_open(id->name, O_CREAT | O_EXCL | O_RDWR, 0600);
	if (file < 0 || ftruncate(file, sizeof(struct shared)) != 0) return say(NULL, SYSTEM_ERROR, "no shared memory");
	return close(file), SUCCESS;
}

static int seconds(void) {
	const char *text = getenv("FAKE_NCCL_SECONDS");
	return text ? atoi(text) : 20;
}

static void describe(char *text, const struct call *call) {
	int length = 0;
	*text = 0;
	for (int i = 0; i < call->count && length < TEXT / 3; i++)
		length += snprintf(text + length, TEXT / 3 - length, "%s%s(%d, %zu)", i ? " " : "", call->ops[i].kind,
				   call->ops[i].peer, call->ops[i].bytes);
	if (!call->count) snprintf(text, TEXT / 3, "an empty group");
}

/* The first failure counts, and is every rank's. */
static int fail(struct comm *comm, int code, const char *text) {
	int none = 0;
	struct shared *shared = comm->shared;
	if (atomic_compare_exchange_strong(&shared->failed, &none, -1)) {
		snprintf(shared->failure, TEXT, "%s", text);
		atomic_store(&shared->failed, code);
	}
	while (atomic_load(&shared->failed) < 0) usleep(50);
	return say(comm, atomic_load(&shared->failed), shared->failure);
}

/* All ranks, in the place of one that this one meets. */
enum { ALL = -1 };

static int meets(const struct comm *comm, int peer, int rank) { return rank != comm->rank && (peer == ALL || peer == rank); }

/* Waits until the peer, or all ranks, have come to this point of what they do with this one. */
static int barrier(struct comm *comm, int peer) {
	struct shared *shared = comm->shared;
	for (int rank = 0; rank < comm->size; rank++)
		if (meets(comm, peer, rank)) atomic_store(&shared->phase[comm->rank][rank], ++comm->phase[rank]);
	time_t begun = time(NULL);
	for (int polls = 0;; polls++) {
		int missing = -1;
		for (int rank = 0; rank < comm->size; rank++)
			if (meets(comm, peer, rank) && atomic_load(&shared->phase[rank][comm->rank]) < comm->phase[rank]) missing = rank;
		if (missing < 0) return SUCCESS;
		if (atomic_load(&comm->aborted)) return say(comm, INVALID_USAGE, "aborted");
		if (atomic_load(&shared->failed)) return fail(comm, REMOTE_ERROR, "");
		if (time(NULL) - begun > seconds()) {
			char text[TEXT], own[TEXT / 3];
			describe(own, &comm->call);
			snprintf(text, TEXT, "rank %d calls %s, and rank %d calls nothing", comm->rank, own, missing);
			return fail(comm, REMOTE_ERROR, text);
		}
		if (polls > 100) usleep(50);
	}
}

static int is_group(const struct call *call) {
	return !call->count || !strcmp(call->ops[0].kind, "send") || !strcmp(call->ops[0].kind, "receive");
}

/* The op of `kind` with `peer` that comes after `from` others of this kind and peer; -1: none. */
static int find(const struct call *call, const char *kind, int peer, int from) {
	for (int i = 0; i < call->count; i++)
		if (!strcmp(call->ops[i].kind, kind) && call->ops[i].peer == peer && from-- == 0) return i;
	return -1;
}

/* Whether what two ranks call fits together. */
static int fits(const struct call *a, int rank_a, const struct call *b, int rank_b) {
	if (is_group(a) != is_group(b)) return 0;
	if (!is_group(a)) return !memcmp(&a->ops[0], &b->ops[0], sizeof a->ops[0]);
	for (int i = 0;; i++) {
		int sent = find(a, "send", rank_b, i), received = find(b, "receive", rank_a, i);
		if (sent < 0 && received < 0) return 1;
		if (sent < 0 || received < 0 || a->ops[sent].bytes != b->ops[received].bytes) return 0;
	}
}

/* Whether `rank` gives bytes away in an op: to `peer`, or to all. */
static int gives(const struct op *op, int rank, int peer) {
	if (!strcmp(op->kind, "send")) return op->peer == peer;
	return !strcmp(op->kind, "all_gather") || (!strcmp(op->kind, "broadcast") && op->peer == rank);
}

/* The bytes that a rank gives away in a call, one op behind the other. */
static size_t stream_bytes(const struct call *call, int rank, int peer) {
	size_t bytes = 0;
	for (int i = 0; i < call->count; i++) bytes += gives(&call->ops[i], rank, peer) ? call->ops[i].bytes : 0;
	return bytes;
}

/* Copies what [start, start + CHUNK) of a stream and [first, first + length) have in common, to or from a place for the latter. */
static void part(char *chunk, size_t start, size_t first, size_t length, char *place, int into_chunk) {
	size_t from = first > start ? first : start, end = first + length < start + CHUNK ? first + length : start + CHUNK;
	if (from >= end) return;
	char *inside = chunk + (from - start), *outside = place + (from - first);
	if (into_chunk) memcpy(inside, outside, end - from);
	else memcpy(outside, inside, end - from);
}

/* Takes what the peer, or all, have given of their streams from `start` on. */
static void take(struct comm *comm, int peer, size_t start) {
	const struct call *own = &comm->call;
	size_t first = 0;
	for (int i = 0; i < own->count; i++) {
		const struct op *op = &own->ops[i];
		if (!strcmp(op->kind, "all_gather")) {
			for (int rank = 0; rank < comm->size; rank++)
				part(comm->shared->data[rank], start, 0, op->bytes, comm->target + rank * op->bytes, 0);
		} else if (!strcmp(op->kind, "broadcast")) {
			if (op->peer != comm->rank) part(comm->shared->data[op->peer], start, 0, op->bytes, comm->places[i], 0);
		} else if (!strcmp(op->kind, "receive") && op->peer == peer) {
			/* The peer's sends to this rank are in the order of these. */
			part(comm->shared->data[peer], start, first, op->bytes, comm->places[i], 0);
			first += op->bytes;
		}
	}
}

/* What this rank and the peer, or all, do in the call. */
static int run_with(struct comm *comm, int peer) {
	struct shared *shared = comm->shared;
	int code;
	if ((code = barrier(comm, peer))) return code;
	size_t longest = stream_bytes(&comm->call, comm->rank, peer);
	for (int rank = 0; rank < comm->size; rank++) {
		if (!meets(comm, peer, rank)) continue;
		const struct call *other = &shared->calls[rank];
		if (!fits(&comm->call, comm->rank, other, rank) || !fits(other, rank, &comm->call, comm->rank)) {
			char text[TEXT], own[TEXT / 3], theirs[TEXT / 3];
			describe(own, &comm->call);
			describe(theirs, other);
			snprintf(text, TEXT, "rank %d calls %s, and rank %d calls %s", comm->rank, own, rank, theirs);
			return fail(comm, INVALID_USAGE, text);
		}
		size_t bytes = stream_bytes(other, rank, comm->rank);
		longest = bytes > longest ? bytes : longest;
	}
	/* A rank that found a mismatch does not come here. */
	if ((code = barrier(comm, peer))) return code;
	for (size_t start = 0; start < longest; start += CHUNK) {
		size_t first = 0;
		for (int i = 0; i < comm->call.count; i++) {
			const struct op *op = &comm->call.ops[i];
			if (!gives(op, comm->rank, peer)) continue;
			part(shared->data[comm->rank], start, first, op->bytes, comm->places[i], 1);
			first += op->bytes;
		}
		if ((code = barrier(comm, peer))) return code;
		take(comm, peer, start);
		if ((code = barrier(comm, peer))) return code;
	}
	return SUCCESS;
}

/* A group's peers come in ascending order, so that of all pairs the first has both of its ranks. */
static int run(struct comm *comm) {
	int code = SUCCESS;
	comm->shared->calls[comm->rank] = comm->call;
	if (!is_group(&comm->call)) return run_with(comm, ALL);
	for (int peer = 0; peer < comm->size && !code; peer++)
		if (find(&comm->call, "send", peer, 0) >= 0 || find(&comm->call, "receive", peer, 0) >= 0) code = run_with(comm, peer);
	return code;
}

static void *work(void *given) {
	struct comm *comm = given;
	int code = run(comm);
	return atomic_store(&comm->state, code), NULL;
}

static void *join(void *given) {
	struct comm *comm = given;
	int code = barrier(comm, ALL);
	if (!code && comm->rank == 0) shm_unlink(comm->name);
	return atomic_store(&comm->state, code), NULL;
}

static int begin(struct comm *comm, void *(*what)(void *)) {
	if (comm->running) pthread_join(comm->thread, NULL);
	atomic_store(&comm->state, IN_PROGRESS);
	comm->running = !pthread_create(&comm->thread, NULL, what, comm);
	return comm->running ? IN_PROGRESS : say(comm, SYSTEM_ERROR, "no thread");
}

int ncclCommInitRankConfig(struct comm **made, int size, id_t128 id, int rank, const void *config) {
	unsigned head[5];
	memcpy(head, config, sizeof head);
	/* size, magic, version, blocking */
	if (head[0] < 72 || head[1] || head[2] != 0xcafebeef || head[3] < 22700 || head[4] != 0)
		return say(NULL, INVALID_ARGUMENT, "the configuration is none");
	if (size < 1 || size > MAX_RANKS || rank < 0 || rank >= size) return say(NULL, INVALID_ARGUMENT, "no such rank");
	int file = shm_open(id.name, O_RDWR, 0600);
	if (file < 0) return say(NULL, SYSTEM_ERROR, "nobody made this id");
	void *shared = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	struct comm *comm = calloc(1, sizeof *comm);
	if (shared == MAP_FAILED || !comm) return say(NULL, SYSTEM_ERROR, "no memory");
	comm->shared = shared, comm->rank = rank, comm->size = size;
	memcpy(comm->name, id.name, sizeof comm->name);
	*made = comm;
	return begin(comm, join);
}

int ncclCommGetAsyncError(struct comm *comm, int *state) { return *state = atomic_load(&comm->state), SUCCESS; }

static int release(struct comm *comm) {
	if (comm->running) pthread_join(comm->thread, NULL);
	if (comm->rank == 0) shm_unlink(comm->name);
	munmap(comm->shared, sizeof(struct shared));
	return free(comm), SUCCESS;
}

int ncclCommAbort(struct comm *comm) { return atomic_store(&comm->aborted, 1), release(comm); }
int ncclCommDestroy(struct comm *comm) { return release(comm); }

static int usable(struct comm *comm, int type) {
	if (atomic_load(&comm->state) == IN_PROGRESS) return say(comm, INVALID_USAGE, "the call before is in progress");
	if (atomic_load(&comm->state)) return atomic_load(&comm->state);
	if (type != 0 && type != 1) return say(comm, INVALID_ARGUMENT, "only bytes are moved: the type is neither ncclInt8 nor ncclUint8");
	return SUCCESS;
}

static int collective(struct comm *comm, const char *kind, int peer, size_t bytes, const void *source, void *target, int type) {
	int code = usable(comm, type);
	if (code) return code;
	if (depth) return say(comm, INVALID_USAGE, "a collective within a group of sends and receives");
	memset(&comm->call, 0, sizeof comm->call);
	comm->call.count = 1;
	comm->call.ops[0].peer = peer, comm->call.ops[0].bytes = bytes;
	snprintf(comm->call.ops[0].kind, sizeof comm->call.ops[0].kind, "%s", kind);
	comm->places[0] = (char *)source, comm->target = target;
	return begin(comm, work);
}

int ncclAllGather(const void *source, void *target, size_t count, int type, struct comm *comm, void *stream) {
	(void)stream;
	const char *own = (char *)target + comm->rank * count, *end = (char *)target + comm->size * count;
	if (source != own && (char *)source < end && (char *)source + count > (char *)target)
		return say(comm, INVALID_ARGUMENT, "the source is within the target, and not at its own place");
	return collective(comm, "all_gather", 0, count, source, target, type);
}

int ncclBroadcast(const void *source, void *target, size_t count, int type, int root, struct comm *comm, void *stream) {
	(void)stream;
	if (source != target || root < 0 || root >= comm->size) return say(comm, INVALID_ARGUMENT, "no such root, or not in place");
	return collective(comm, "broadcast", root, count, source, target, type);
}

int ncclGroupStart(void) {
	if (depth++) return SUCCESS;
	memset(&group, 0, sizeof group);
	return group_comm = NULL, SUCCESS;
}

static int add(const char *kind, const void *place, size_t count, int type, int peer, struct comm *comm) {
	int code = usable(comm, type);
	if (code) return code;
	if (!depth) return say(comm, INVALID_USAGE, "a send or receive outside of a group");
	if (group_comm && group_comm != comm) return say(comm, INVALID_USAGE, "a group over two communicators");
	if (peer < 0 || peer >= comm->size || peer == comm->rank) return say(comm, INVALID_ARGUMENT, "no such peer, or oneself");
	if (group.count == MAX_OPS) return say(comm, INVALID_USAGE, "a group of too many calls for this library of tests");
	struct op *op = &group.ops[group.count];
	snprintf(op->kind, sizeof op->kind, "%s", kind);
	op->peer = peer, op->bytes = count;
	group_places[group.count++] = (char *)place;
	return group_comm = comm, SUCCESS;
}

int ncclSend(const void *source, size_t count, int type, int peer, struct comm *comm, void *stream) {
	return (void)stream, add("send", source, count, type, peer, comm);
}

int ncclRecv(void *target, size_t count, int type, int peer, struct comm *comm, void *stream) {
	return (void)stream, add("receive", target, count, type, peer, comm);
}

int ncclGroupEnd(void) {
	if (!depth) return say(NULL, INVALID_USAGE, "the end of no group");
	if (--depth || !group_comm) return SUCCESS;
	group_comm->call = group;
	memcpy(group_comm->places, group_places, sizeof group_places);
	return begin(group_comm, work);
}
