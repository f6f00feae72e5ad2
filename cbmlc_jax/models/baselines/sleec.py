"""SLEEC: rows of like labels are put near each other, and neighbours looked up there.

K. Bhatia, H. Jain, P. Kar, M. Varma and P. Jain, "Sparse local embeddings for extreme
multi-label classification", NeurIPS 2015.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
import scipy.sparse
import sklearn
from jaxtyping import Float, Int, UInt8
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from cbmlc_jax.models.baselines import mlknn, nearest
from cbmlc_jax.models.baselines.estimator import Inputs, Params

_CHUNK = 1024  # rows at once: 1024 x N inner products
MEGABYTES = 64  # of distances at once
_LARGEST_GRAM = 5000  # unknowns of a dense system of equations: 200 MB


@dataclasses.dataclass(frozen=True)
class SLEEC:
    """score = mean over learners of the mean label vector of nearest embedded rows.

    Each learner parts the rows x (brought to length 1, as the authors do) into
    `clusters` by k-means; within a cluster of n rows, u_i the labels of row i brought
    to length 1:

        1. O: pairs (i, j), j among the `svp_neighbours` of largest u_i . u_j or vice
           versa
        2. Z [n, d] = argmin sum_O (u_i . u_j - z_i . z_j)^2   singular value projection
        3. V [F, d] = argmin |X V - Z|^2 + penalty |V|^2
        4. the neighbours of a new x are the training rows of its cluster with the
           smallest |V'x - V'x_i|, of equal ones the first

    Two departures from the paper.  It takes inner products of the labels as they are;
    at length 1, rows of many labels do not rule the fit (and it is several times
    faster).  It adds |V x|_1 to step 3 and solves it by ADMM, to make the embeddings
    sparse: a matter of speed at millions of labels, so that ridge regression is used.

    The learners differ in their k-means alone: several of one cluster are equal.
    `penalty` and `iterations` were chosen on a tenth of bibtex's training rows, the
    numbers of neighbours and dimensions are those of the authors for bibtex.

    Attributes:
        learners: number of learners.
        clusters: k of k-means.
        svp_neighbours: of each row in step 1, itself among them.
        dimension: d; n - 1 where n is smaller.
        neighbours: of a new row; all of its cluster where there are fewer.
        penalty: of step 3, above 0.
        iterations: of step 2.
        seed: of k-means and of the eigenvector iteration's start.
    """

    learners: int = 1
    clusters: int = 1
    svp_neighbours: int = 250
    dimension: int = 100
    neighbours: int = 25
    penalty: float = 1.0
    iterations: int = 10
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and not value > 0:
                raise ValueError(f"{field.name} is {value}, must be above 0")

    def fit(self, inputs: Inputs, labels: UInt8[np.ndarray, "rows labels"]) -> Params:
        """The labels and each `_fit_learner`; ValueError where there is no row."""
        if not len(labels):
            raise ValueError("SLEEC has no training rows")
        rows = _unit_rows(inputs)
        params: Params = {"labels": labels}
        for learner in range(self.learners):
            draw = np.random.default_rng([self.seed, learner])
            params[f"learner_{learner}"] = self._fit_learner(rows, labels, draw)
        return params

    def _fit_learner(
        self, rows: Inputs, labels: np.ndarray, draw: np.random.Generator
    ) -> Params:
        """centres float64 [C, F] of the clusters with a row, cluster int [N] of each
        row, weights float32 [C, F, d] and embeddings float32 [N, d], V'x of each row.
        """
        centres = _centres(rows, self.clusters, draw)
        used, cluster = np.unique(_assign(rows, centres), return_inverse=True)
        weights = np.zeros((len(used), rows.shape[1], self.dimension), np.float32)
        embeddings = np.zeros((len(labels), self.dimension), np.float32)
        for c in range(len(used)):
            members = np.flatnonzero(cluster == c)
            observed = similarity_graph(labels[members], self.svp_neighbours)
            wanted = embed(observed, self.dimension, self.iterations, draw)
            weights[c] = _ridge(rows[members], wanted, self.penalty)
            embeddings[members] = rows[members] @ weights[c]
        parts = {"centres": centres[used], "cluster": cluster}
        return parts | {"weights": weights, "embeddings": embeddings}

    def scores(
        self, params: Params, inputs: Inputs
    ) -> Float[np.ndarray, "rows labels"]:
        """float32 [N, L]."""
        rows, labels = _unit_rows(inputs), np.asarray(params["labels"])
        total = np.zeros((rows.shape[0], labels.shape[1]), np.float32)
        for learner in range(self.learners):
            total += self._vote(params[f"learner_{learner}"], rows, labels)
        return total / np.float32(self.learners)

    def _vote(
        self, params: Params, rows: Inputs, labels: np.ndarray
    ) -> Float[np.ndarray, "rows labels"]:
        """Mean label vector of each row's nearest embeddings, by one learner."""
        names = ("centres", "cluster", "weights", "embeddings")
        centres, cluster, weights, embeddings = (np.asarray(params[k]) for k in names)
        assigned = _assign(rows, centres)
        votes = np.zeros((rows.shape[0], labels.shape[1]), np.float32)
        for c in range(len(centres)):
            members = np.flatnonzero(cluster == c)
            k = min(self.neighbours, len(members))
            ours = np.flatnonzero(assigned == c)
            queries = (rows[ours] @ weights[c]).astype(np.float32)
            start = 0
            for found in nearest.by_distance(embeddings[members], k, queries):
                part = ours[start : start + len(found)]
                votes[part] = mlknn.neighbour_counts(members[found], labels) / k
                start += len(found)
        return votes


def _unit_rows(inputs: Inputs) -> Inputs:
    """float64 rows of Euclidean length 1; rows of 0 stay."""
    if not inputs.shape[0]:
        return inputs
    rows = normalize(inputs.astype(np.float64))
    if scipy.sparse.issparse(rows):  # KMeans takes no 64-bit indices
        ends, indices = rows.indptr.astype(np.int32), rows.indices.astype(np.int32)
        return scipy.sparse.csr_array((rows.data, indices, ends), shape=rows.shape)
    return rows


def _centres(
    rows: Inputs, clusters: int, draw: np.random.Generator
) -> Float[np.ndarray, "clusters features"]:
    """Centres of k-means; of one cluster, which needs none, 0."""
    clusters = min(clusters, rows.shape[0])
    if clusters == 1:
        return np.zeros((1, rows.shape[1]))
    state = int(draw.integers(2**31))
    return KMeans(clusters, n_init=1, random_state=state).fit(rows).cluster_centers_


def _assign(
    rows: Inputs, centres: Float[np.ndarray, "clusters features"]
) -> Int[np.ndarray, " rows"]:
    """argmin_c |x - c|^2 = argmax_c x . c - |c|^2 / 2."""
    return np.argmax(rows @ centres.T - (centres**2).sum(1)[None] / 2, axis=1)


def similarity_graph(
    labels: UInt8[np.ndarray, "rows labels"], neighbours: int
) -> scipy.sparse.csr_array:
    """u_i . u_j (step 1) at the observed pairs O [n, n], symmetric, zeros stored."""
    rows, k = scipy.sparse.csr_array(labels, dtype=float), min(neighbours, len(labels))
    index = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
    with sklearn.config_context(working_memory=MEGABYTES):
        graph = index.fit(rows).kneighbors_graph(rows, mode="distance")
    # 1 + u_i . u_j in between: the maximum of sparse matrices drops zeros.
    graph.data = 2 - graph.data
    graph = scipy.sparse.csr_array(graph.maximum(graph.T))
    graph.data -= 1
    return graph


def embed(
    observed: scipy.sparse.csr_array,
    dimension: int,
    iterations: int,
    draw: np.random.Generator,
) -> Float[np.ndarray, "rows dimension"]:
    """Z of step 2 by singular value projection (Jain, Meka and Dhillon, 2010).

        M <- P_d(M + P_O(S - M)),  M = Z Z', from M = 0

    P_O keeps the observed entries, P_d is the nearest positive semidefinite matrix of
    rank d: its d largest eigenvalues, the negative ones set to 0.  At this step
    length, 1, the error on O never rises.  M is kept as Z, and what P_d gets as sparse
    + Z Z': no [n, n] matrix is made where n is large.
    `observed` is S [n, n], O its stored entries; columns of Z past n - 1 are 0.
    """
    n = observed.shape[0]
    factors = np.zeros((n, dimension))
    rank = min(dimension, max(n - 1, 1))
    if not observed.data.any():  # the eigenvector iteration cannot start from M = 0
        return factors
    residual = observed.copy()
    for _ in range(iterations):
        residual.data = observed.data - _products(factors, observed)
        values, vectors = _largest(residual, factors, rank, draw)
        factors[:, :rank] = vectors * np.sqrt(np.maximum(values, 0))[None]
    return factors


def _products(
    factors: Float[np.ndarray, "rows dimension"], pattern: scipy.sparse.csr_array
) -> Float[np.ndarray, " entries"]:
    """z_i . z_j at the stored entries (i, j), in their order."""
    values = np.empty(pattern.nnz)
    for start in range(0, len(factors), _CHUNK):
        block = factors[start : start + _CHUNK]
        ends = pattern.indptr[start : start + len(block) + 1]
        entries = slice(ends[0], ends[-1])
        row = np.repeat(np.arange(len(block)), np.diff(ends))
        values[entries] = (block @ factors.T)[row, pattern.indices[entries]]
    return values


def _largest(
    residual: scipy.sparse.csr_array,
    factors: Float[np.ndarray, "rows dimension"],
    rank: int,
    draw: np.random.Generator,
) -> tuple[Float[np.ndarray, " rank"], Float[np.ndarray, "rows rank"]]:
    """Eigenpairs of the `rank` largest eigenvalues of residual + Z Z'."""
    n = len(factors)
    if n <= 4 * rank:  # dense is faster, and has no rank < n to respect
        dense = residual.toarray() + factors @ factors.T
        return scipy.linalg.eigh(dense, subset_by_index=[n - rank, n - 1])
    operator = LinearOperator(
        (n, n), lambda v: residual @ v + factors @ (factors.T @ v), dtype=np.float64
    )
    # Hundreds of small products: handing each to threads takes longer than doing it.
    with threadpool_limits(1):
        return eigsh(operator, k=rank, which="LA", tol=1e-4, rng=draw)


def _ridge(
    rows: Inputs, wanted: Float[np.ndarray, "rows dimension"], penalty: float
) -> Float[np.ndarray, "features dimension"]:
    """V of step 3: (X'X + penalty)^-1 X'Z."""
    solver = "cholesky" if min(rows.shape) <= _LARGEST_GRAM else "sparse_cg"
    return Ridge(penalty, fit_intercept=False, solver=solver).fit(rows, wanted).coef_.T
